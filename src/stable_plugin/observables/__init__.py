"""Observables, each a :class:`torchmetrics.Metric`."""

from stable_plugin.observables.base import Observable
from stable_plugin.observables.contacts import LocalContactAmplitudes, LocalContacts
from stable_plugin.observables.density import Density
from stable_plugin.observables.dynamics import (
    DiffusionCoefficient,
    MeanSquaredDisplacement,
    PowerSpectrum,
    VelocityAutocorrelation,
)
from stable_plugin.observables.energetic import HeatCapacity, HeatOfVaporization
from stable_plugin.observables.local import LocalBondAmplitudes, LocalBondLengths, LocalObservable
from stable_plugin.observables.potential import PotentialObservable
from stable_plugin.observables.pressure import Pressure, Stress
from stable_plugin.observables.radial import RadialDistribution
from stable_plugin.observables.series import TimeCorrelation
from stable_plugin.observables.structure import AngleDistribution, BondAmplitudes, BondLengths, DistanceDistribution
from stable_plugin.observables.trajectory import trajectory_from_atoms

__all__ = [
    "AngleDistribution",
    "BondAmplitudes",
    "BondLengths",
    "Density",
    "DiffusionCoefficient",
    "DistanceDistribution",
    "HeatCapacity",
    "HeatOfVaporization",
    "LocalBondAmplitudes",
    "LocalBondLengths",
    "LocalContactAmplitudes",
    "LocalContacts",
    "LocalObservable",
    "MeanSquaredDisplacement",
    "Observable",
    "PotentialObservable",
    "PowerSpectrum",
    "Pressure",
    "RadialDistribution",
    "Stress",
    "TimeCorrelation",
    "VelocityAutocorrelation",
    "trajectory_from_atoms",
]
