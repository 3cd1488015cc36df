"""Potentials: one interface, a registry, and a folder for each family of models."""

from __future__ import annotations

from stable_plugin.models.averages import WeightAverage
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily
from stable_plugin.models.module import ModulePotential, NoInteraction
from stable_plugin.models.registry import (
    PotentialMaker,
    families,
    find_potential,
    get_family,
    load_potential,
    potential_maker,
)

__all__ = [
    "ModelFamily",
    "ModulePotential",
    "NoInteraction",
    "Potential",
    "PotentialMaker",
    "WeightAverage",
    "families",
    "find_potential",
    "get_family",
    "load_potential",
    "potential_maker",
]
