"""Observables, each a :class:`torchmetrics.Metric`."""

from stable_plugin.observables.base import Observable
from stable_plugin.observables.contacts import LocalContactAmplitudes, LocalContacts
from stable_plugin.observables.local import LocalBondAmplitudes, LocalBondLengths, LocalObservable
from stable_plugin.observables.radial import RadialDistribution
from stable_plugin.observables.structure import AngleDistribution, BondAmplitudes, BondLengths, DistanceDistribution

__all__ = [
    "AngleDistribution",
    "BondAmplitudes",
    "BondLengths",
    "DistanceDistribution",
    "LocalBondAmplitudes",
    "LocalBondLengths",
    "LocalContactAmplitudes",
    "LocalContacts",
    "LocalObservable",
    "Observable",
    "RadialDistribution",
]
