"""Instability detectors, which classify the replicas of a simulation as stable or unstable."""

from stable_plugin.detectors.base import AnyOf, Detector
from stable_plugin.detectors.condensed import (
    CoordinationNumber,
    LindemannCriterion,
    ObservableDeviation,
    VolumeDeviation,
)
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
from stable_plugin.detectors.published import (
    PUBLISHED,
    BondStretch,
    HydrogenDrift,
    Published,
    PublishedRadialDistribution,
    TemperatureExplosion,
    published_detector,
)
from stable_plugin.detectors.thermal import MomentumLimits, NonFinite, RunawayTemperature, TemperatureLimits

__all__ = [
    "PUBLISHED",
    "AngleLimits",
    "AnyOf",
    "BondDeviation",
    "BondLimits",
    "BondStretch",
    "ChiralityLimits",
    "ClosestContact",
    "ContactLimits",
    "CoordinateLimits",
    "CoordinationNumber",
    "Detector",
    "HydrogenDrift",
    "IntermolecularContact",
    "LindemannCriterion",
    "MomentumLimits",
    "NonFinite",
    "ObservableDeviation",
    "PlaneLimits",
    "Published",
    "PublishedRadialDistribution",
    "RingLimits",
    "RunawayTemperature",
    "TemperatureExplosion",
    "TemperatureLimits",
    "VolumeDeviation",
    "published_detector",
]
