"""Batched molecular dynamics."""

from stable_plugin.simulation.execution import Execution
from stable_plugin.simulation.integrators import Integrator, Langevin, NoseHooverChain
from stable_plugin.simulation.simulator import Simulator
from stable_plugin.simulation.state import State
from stable_plugin.simulation.window import Window

__all__ = ["Execution", "Integrator", "Langevin", "NoseHooverChain", "Simulator", "State", "Window"]
