"""Batched molecular dynamics."""

from stable_plugin.simulation.integrators import Integrator, Langevin, NoseHooverChain
from stable_plugin.simulation.simulator import Simulator, Window
from stable_plugin.simulation.state import State

__all__ = ["Integrator", "Langevin", "NoseHooverChain", "Simulator", "State", "Window"]
