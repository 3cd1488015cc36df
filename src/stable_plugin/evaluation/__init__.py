"""Evaluation of potentials in molecular dynamics, and its report."""

from stable_plugin.evaluation.evaluator import Evaluator, evaluate
from stable_plugin.evaluation.label_errors import mean_energy_error
from stable_plugin.evaluation.preflight import Preflight, check_potential
from stable_plugin.evaluation.report import summary, write_report
from stable_plugin.evaluation.summaries import Evaluation
from stable_plugin.evaluation.system_reports import system_reports, write_system_reports

__all__ = [
    "Evaluation",
    "Evaluator",
    "Preflight",
    "check_potential",
    "evaluate",
    "mean_energy_error",
    "summary",
    "system_reports",
    "write_report",
    "write_system_reports",
]
