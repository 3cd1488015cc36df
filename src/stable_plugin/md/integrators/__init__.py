"""Integrators of the equations of motion, one per file."""

from stable_plugin.md.integrators.base import ForceFunction, Integrator, drift, kick
from stable_plugin.md.integrators.langevin import Langevin, ornstein_uhlenbeck
from stable_plugin.md.integrators.nose_hoover import NoseHooverChain

__all__ = ["ForceFunction", "Integrator", "Langevin", "NoseHooverChain", "drift", "kick", "ornstein_uhlenbeck"]
