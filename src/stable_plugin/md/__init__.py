"""Batched molecular dynamics."""

from stable_plugin.md.barostat import MonteCarloBarostat
from stable_plugin.md.execution import Execution
from stable_plugin.md.integrators import Integrator, Langevin, NoseHooverChain
from stable_plugin.md.simulator import Simulator
from stable_plugin.md.state import State
from stable_plugin.md.system import System
from stable_plugin.md.window import Window

__all__ = [
    "Execution",
    "Integrator",
    "Langevin",
    "MonteCarloBarostat",
    "NoseHooverChain",
    "Simulator",
    "State",
    "System",
    "Window",
]
