"""What StABlE training is beside any trainer: settings, the two gradients made one, progress, state."""

from stable_plugin.training.defaults import Local
from stable_plugin.training.gradients import Weight
from stable_plugin.training.session import Session, SpoiledGradientsError
from stable_plugin.training.settings import LoopSettings

__all__ = ["Local", "LoopSettings", "Session", "SpoiledGradientsError", "Weight"]
