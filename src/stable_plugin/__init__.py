"""StABlE training: repair neural-network potentials that fail in molecular dynamics, without new labels."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from stable_plugin.config import Schedule, StABlEConfig, SystemConfig
from stable_plugin.detectors import (
    AngleLimits,
    AnyOf,
    BondDeviation,
    BondLimits,
    ChiralityLimits,
    ClosestContact,
    ContactLimits,
    CoordinationNumber,
    Detector,
    IntermolecularContact,
    LindemannCriterion,
    MomentumLimits,
    NonFinite,
    ObservableDeviation,
    PlaneLimits,
    RingLimits,
    RunawayTemperature,
    TemperatureLimits,
    VolumeDeviation,
)
from stable_plugin.md import Execution, Langevin, MonteCarloBarostat, NoseHooverChain, System
from stable_plugin.md.neighborhoods import AtomsWithin, Molecules, NearestMolecules
from stable_plugin.observables import (
    AngleDistribution,
    BondAmplitudes,
    BondLengths,
    Density,
    DiffusionCoefficient,
    DistanceDistribution,
    HeatCapacity,
    HeatOfVaporization,
    LocalBondAmplitudes,
    LocalBondLengths,
    LocalContactAmplitudes,
    LocalContacts,
    MeanSquaredDisplacement,
    Observable,
    PowerSpectrum,
    Pressure,
    RadialDistribution,
    Stress,
    VelocityAutocorrelation,
)

if TYPE_CHECKING:
    from stable_plugin.evaluation import Evaluator, evaluate
    from stable_plugin.integrations.fairchem.runner import EvaluateRunner, StABlERunner
    from stable_plugin.integrations.lightning import (
        ExtxyzDataModule,
        PseudoLabeledDataModule,
        StABlECallback,
        StABlEMixin,
    )
    from stable_plugin.integrations.recipes.correction import PairCorrection

__all__ = [
    "AngleDistribution",
    "AngleLimits",
    "AnyOf",
    "AtomsWithin",
    "BondAmplitudes",
    "BondDeviation",
    "BondLengths",
    "BondLimits",
    "ChiralityLimits",
    "ClosestContact",
    "ContactLimits",
    "CoordinationNumber",
    "Density",
    "Detector",
    "DiffusionCoefficient",
    "DistanceDistribution",
    "EvaluateRunner",
    "Evaluator",
    "Execution",
    "ExtxyzDataModule",
    "HeatCapacity",
    "HeatOfVaporization",
    "IntermolecularContact",
    "Langevin",
    "LindemannCriterion",
    "LocalBondAmplitudes",
    "LocalBondLengths",
    "LocalContactAmplitudes",
    "LocalContacts",
    "MeanSquaredDisplacement",
    "Molecules",
    "MomentumLimits",
    "MonteCarloBarostat",
    "NearestMolecules",
    "NonFinite",
    "NoseHooverChain",
    "Observable",
    "ObservableDeviation",
    "PairCorrection",
    "PlaneLimits",
    "PowerSpectrum",
    "Pressure",
    "PseudoLabeledDataModule",
    "RadialDistribution",
    "RingLimits",
    "RunawayTemperature",
    "Schedule",
    "StABlECallback",
    "StABlEConfig",
    "StABlEMixin",
    "StABlERunner",
    "Stress",
    "System",
    "SystemConfig",
    "TemperatureLimits",
    "VelocityAutocorrelation",
    "VolumeDeviation",
    "__version__",
    "evaluate",
]

__version__ = version("stable-plugin")


_LAZY = {
    "Evaluator": "stable_plugin.evaluation",
    "evaluate": "stable_plugin.evaluation",
    "ExtxyzDataModule": "stable_plugin.integrations.lightning",
    "PairCorrection": "stable_plugin.integrations.recipes.correction",
    "PseudoLabeledDataModule": "stable_plugin.integrations.lightning",
    "StABlECallback": "stable_plugin.integrations.lightning",
    "StABlEMixin": "stable_plugin.integrations.lightning",
}

_PIPELINES = {
    "EvaluateRunner": ("stable_plugin.integrations.recipes.evaluate", "EvaluatePipeline"),
    "StABlERunner": ("stable_plugin.integrations.recipes.pipeline", "StABlEPipeline"),
}


def __getattr__(name: str) -> Any:
    # Lightning and matplotlib are slow to import, and simulations do not need them.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _PIPELINES:
        try:
            return getattr(import_module("stable_plugin.integrations.fairchem.runner"), name)
        except ImportError:  # without fairchem, whose command line needs its own kind of runner
            module, pipeline = _PIPELINES[name]
            return getattr(import_module(module), pipeline)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
