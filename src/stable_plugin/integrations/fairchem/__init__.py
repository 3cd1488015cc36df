"""StABlE training from the ``fairchem`` command line: runners for recipes, and a callback for native training."""

# First: its error says what to install when fairchem is missing.
import stable_plugin.models.fairchem.potential  # noqa: F401  # isort: skip

from stable_plugin.integrations.fairchem.callback import StABlECallback
from stable_plugin.integrations.fairchem.runner import EvaluateRunner, StABlERunner

__all__ = ["EvaluateRunner", "StABlECallback", "StABlERunner"]
