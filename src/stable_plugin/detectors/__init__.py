"""Instability detectors, which classify the replicas of a simulation as stable or unstable."""

from stable_plugin.detectors.base import AnyOf, Detector
from stable_plugin.detectors.condensed import CoordinationNumber, LindemannCriterion, ObservableDeviation
from stable_plugin.detectors.contacts import ContactLimits
from stable_plugin.detectors.fluctuations import (
    AngleLimits,
    BondLimits,
    ChiralityLimits,
    CoordinateLimits,
    PlaneLimits,
    RingLimits,
)
from stable_plugin.detectors.geometry import BondDeviation, ClosestContact, IntermolecularContact
from stable_plugin.detectors.thermal import MomentumLimits, NonFinite, RunawayTemperature, TemperatureLimits

__all__ = [
    "AngleLimits",
    "AnyOf",
    "BondDeviation",
    "BondLimits",
    "ChiralityLimits",
    "ClosestContact",
    "ContactLimits",
    "CoordinateLimits",
    "CoordinationNumber",
    "Detector",
    "IntermolecularContact",
    "LindemannCriterion",
    "MomentumLimits",
    "NonFinite",
    "ObservableDeviation",
    "PlaneLimits",
    "RingLimits",
    "RunawayTemperature",
    "TemperatureLimits",
]
