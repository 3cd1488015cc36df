"""Potentials: one interface, a registry, and a folder for each family of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stable_plugin.models.averages import WeightAverage
from stable_plugin.models.base import Potential
from stable_plugin.models.family import ModelFamily
from stable_plugin.models.module import ModulePotential, NoInteraction
from stable_plugin.models.pair_correction import PairCorrected
from stable_plugin.models.registry import (
    PotentialMaker,
    families,
    family_of,
    find_potential,
    get_family,
    load_potential,
    potential_maker,
)

if TYPE_CHECKING:
    from stable_plugin.models.fine_tuning import FineTuningModule

__all__ = [
    "FineTuningModule",
    "ModelFamily",
    "ModulePotential",
    "NoInteraction",
    "PairCorrected",
    "Potential",
    "PotentialMaker",
    "WeightAverage",
    "families",
    "family_of",
    "find_potential",
    "get_family",
    "load_potential",
    "potential_maker",
]


def __getattr__(name: str) -> Any:
    if name == "FineTuningModule":  # Lightning is slow to import and may be missing
        from stable_plugin.models.fine_tuning import FineTuningModule

        return FineTuningModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
