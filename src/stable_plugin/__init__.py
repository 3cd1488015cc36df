"""StABlE training: repair neural-network potentials that fail in molecular dynamics, without new labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stable_plugin.algorithm.schedule import Schedule
from stable_plugin.detectors import (
    AnyOf,
    BondDeviation,
    ClosestContact,
    CoordinationNumber,
    Detector,
    IntermolecularContact,
    LindemannCriterion,
    NonFinite,
    ObservableDeviation,
    RunawayTemperature,
)
from stable_plugin.md import Execution, Langevin, NoseHooverChain, System
from stable_plugin.md.neighborhoods import AtomsWithin, Molecules, NearestMolecules
from stable_plugin.observables import (
    AngleDistribution,
    BondAmplitudes,
    BondLengths,
    DiffusionCoefficient,
    DistanceDistribution,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    MeanSquaredDisplacement,
    Observable,
    PowerSpectrum,
    RadialDistribution,
    VelocityAutocorrelation,
)

if TYPE_CHECKING:
    from stable_plugin.integrations.lightning import StABlECallback, StABlEMixin

__all__ = [
    "AngleDistribution",
    "AnyOf",
    "AtomsWithin",
    "BondAmplitudes",
    "BondDeviation",
    "BondLengths",
    "ClosestContact",
    "CoordinationNumber",
    "Detector",
    "DiffusionCoefficient",
    "DistanceDistribution",
    "Execution",
    "IntermolecularContact",
    "Langevin",
    "LindemannCriterion",
    "LocalBondAmplitudes",
    "LocalBondLengths",
    "LocalContactAmplitudes",
    "LocalContacts",
    "MeanSquaredDisplacement",
    "Molecules",
    "NearestMolecules",
    "NonFinite",
    "NoseHooverChain",
    "Observable",
    "ObservableDeviation",
    "PowerSpectrum",
    "RadialDistribution",
    "RunawayTemperature",
    "Schedule",
    "StABlECallback",
    "StABlEMixin",
    "System",
    "VelocityAutocorrelation",
]


def __getattr__(name: str) -> Any:
    # Who only simulates or measures does not wait for Lightning.
    if name in ("StABlECallback", "StABlEMixin"):
        from stable_plugin.integrations import lightning

        return getattr(lightning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
