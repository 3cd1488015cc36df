"""StABlE training from the ``fairchem`` command line: runners for recipes, and a callback for native training."""

from stable_plugin.fairchem.callback import StABlECallback
from stable_plugin.fairchem.runner import EvaluateRunner, StABlERunner

__all__ = ["EvaluateRunner", "StABlECallback", "StABlERunner"]
