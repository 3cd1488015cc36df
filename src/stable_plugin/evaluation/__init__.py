"""Evaluation of potentials in molecular dynamics, and its report."""

from stable_plugin.evaluation.evaluate import Evaluation, Evaluator, evaluate, mean_energy_error
from stable_plugin.evaluation.report import summary, write_report

__all__ = ["Evaluation", "Evaluator", "evaluate", "mean_energy_error", "summary", "write_report"]
