"""StABlE training from the ``fairchem`` command line."""

from stable_plugin.fairchem.runner import EvaluateRunner, StABlERunner

__all__ = ["EvaluateRunner", "StABlERunner"]
