"""Static checks of a potential, in seconds, before any simulation at temperature."""

from stable_plugin.evaluation.preflight.check import check_potential, check_systems
from stable_plugin.evaluation.preflight.findings import Preflight

__all__ = ["Preflight", "check_potential", "check_systems"]
