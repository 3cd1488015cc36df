"""Batched molecular dynamics."""

from stable_plugin.simulation.execution import Execution
from stable_plugin.simulation.integrators import Integrator, Langevin, NoseHooverChain
from stable_plugin.simulation.simulator import Simulator, Window
from stable_plugin.simulation.state import State

__all__ = ["Execution", "Integrator", "Langevin", "NoseHooverChain", "Simulator", "State", "Window"]
