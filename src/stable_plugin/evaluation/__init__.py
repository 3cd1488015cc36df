"""Evaluation of potentials in molecular dynamics, and its report."""

from stable_plugin.evaluation.evaluator import Evaluator, evaluate
from stable_plugin.evaluation.label_errors import mean_energy_error
from stable_plugin.evaluation.preflight import Preflight, check_potential
from stable_plugin.evaluation.report import summary, write_report
from stable_plugin.evaluation.summaries import Evaluation

__all__ = [
    "Evaluation",
    "Evaluator",
    "Preflight",
    "check_potential",
    "evaluate",
    "mean_energy_error",
    "summary",
    "write_report",
]
