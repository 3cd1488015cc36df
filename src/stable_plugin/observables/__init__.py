"""Observables, each a :class:`torchmetrics.Metric`."""

from stable_plugin.observables.base import Observable
from stable_plugin.observables.structure import AngleDistribution, BondLengths, DistanceDistribution

__all__ = ["AngleDistribution", "BondLengths", "DistanceDistribution", "Observable"]
