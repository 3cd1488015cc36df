"""Instability detectors, which classify the replicas of a simulation as stable or unstable."""

from stable_plugin.detectors.base import AnyOf, Detector
from stable_plugin.detectors.condensed import CoordinationNumber, LindemannCriterion, ObservableDeviation
from stable_plugin.detectors.geometry import BondDeviation, ClosestContact, IntermolecularContact
from stable_plugin.detectors.thermal import NonFinite, RunawayTemperature

__all__ = [
    "AnyOf",
    "BondDeviation",
    "ClosestContact",
    "CoordinationNumber",
    "Detector",
    "IntermolecularContact",
    "LindemannCriterion",
    "NonFinite",
    "ObservableDeviation",
    "RunawayTemperature",
]
