"""Evaluation of potentials in molecular dynamics, and its report."""

from stable_plugin.evaluation.evaluate import Evaluation, Evaluator, evaluate
from stable_plugin.evaluation.report import summary, write_report

__all__ = ["Evaluation", "Evaluator", "evaluate", "summary", "write_report"]
