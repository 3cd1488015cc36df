"""Instability detectors."""

from stable_plugin.detectors.base import AnyOf, Detector
from stable_plugin.detectors.geometry import BondDeviation, ClosestContact
from stable_plugin.detectors.thermal import NonFinite, RunawayTemperature

__all__ = ["AnyOf", "BondDeviation", "ClosestContact", "Detector", "NonFinite", "RunawayTemperature"]
