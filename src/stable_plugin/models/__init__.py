"""Potentials: one interface, a registry, and a folder for each family of models."""

from __future__ import annotations

from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily
from stable_plugin.models.module import ModulePotential, NoInteraction
from stable_plugin.models.registry import families, find_potential, get_family, load_potential

__all__ = [
    "ModelFamily",
    "ModulePotential",
    "NoInteraction",
    "Potential",
    "families",
    "find_potential",
    "get_family",
    "load_potential",
]
