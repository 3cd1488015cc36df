"""What StABlE training is beside any trainer: settings, the two gradients made one, progress, state."""

from stable_plugin.algorithm.gradients import Weight
from stable_plugin.defaults import Local
from stable_plugin.integrations.session import NonFiniteGradientError, Session
from stable_plugin.integrations.settings import LoopSettings

__all__ = ["Local", "LoopSettings", "NonFiniteGradientError", "Session", "Weight"]
