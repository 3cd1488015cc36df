"""Warnings of a report: worse energies or forces, and stability that was not verified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from stable_plugin.algorithm.records import Verification
from stable_plugin.config import MAX_ENERGY_MAE_RATIO, MAX_FORCE_MAE_GROWTH
from stable_plugin.evaluation.formatting import number
from stable_plugin.evaluation.wording import EvaluationSummary, evaluations, failed, outcome

MIN_ENERGY_MAE_INCREASE_MEV = 5.0
"""Increase of the energy error in meV per atom below which a report does not warn, whatever the ratio."""


def report_warnings(report: Mapping[str, Any]) -> list[str]:
    """Return warnings about the trained model.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.

    Returns:
        One text per warning: worse forces, worse energies, stability that was not verified.
    """
    stages = evaluations(report)
    lines = []
    if {"before", "after"} <= set(stages):
        before, after = stages["before"], stages["after"]
        lines = [_force_warning(before, after), _energy_warning(before, after)]
    return [line for line in [*lines, *_system_warnings(report), *_unverified_warnings(report)] if line]


def _system_warnings(report: Mapping[str, Any]) -> list[str]:
    """Return a warning for each further system that has become less stable, and for each that was not evaluated."""
    lines = []
    for name, each in (report.get("systems") or {}).items():
        stages = evaluations(each)
        if name != report.get("system") and "before" in stages and outcome(each) == "worse":
            counts = f"{failed(stages['before'])} before, {failed(stages['after'])} after"
            lines.append(f"More replicas of {name} fail after the repair: {counts}.")
    not_evaluated = report.get("not_evaluated") or {}
    return [
        *lines,
        *(
            f"{name} was not evaluated: {not_evaluated.get(name, 'see the log')}."
            for name in report.get("failed_systems") or []
        ),
    ]


def _force_warning(before: EvaluationSummary, after: EvaluationSummary) -> str:
    old, new = (summary.get("force_mae_mev_per_A") for summary in (before, after))
    if not _is_finite(old):
        return ""
    if not _is_finite(new):
        return _not_finite("force", f"{number(old)} meV/Å")
    if new - old <= MAX_FORCE_MAE_GROWTH * old:
        return ""
    growth = f" (+{100 * (new / old - 1):.0f} %)" if old > 0 else ""
    return (
        f"The repair made forces worse: the force MAE on held-out frames rose from {number(old)} to {number(new)} meV/Å"
        f"{growth}; the bound is +{100 * MAX_FORCE_MAE_GROWTH:.0f} %. Lower gradient_ratio or learning_rate."
    )


def _energy_warning(before: EvaluationSummary, after: EvaluationSummary) -> str:
    old, new = (summary.get("energy_mae_mev_per_atom") for summary in (before, after))
    if not _is_finite(old):
        return ""
    if not _is_finite(new):
        return _not_finite("energy", f"{number(old)} meV per atom")
    if new <= MAX_ENERGY_MAE_RATIO * old or new - old < MIN_ENERGY_MAE_INCREASE_MEV:
        return ""
    return (
        f"The repair made energies worse: the energy MAE on held-out frames rose from {number(old)} to {number(new)} meV "
        f"per atom; the bound is {MAX_ENERGY_MAE_RATIO:g} times the error before. Lower gradient_ratio or learning_rate."
    )


def _not_finite(quantity: str, before: str) -> str:
    return (
        f"The {quantity} MAE on held-out frames is not a finite number after the repair (before: {before}). Do not use "
        "the model; lower gradient_ratio or learning_rate."
    )


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _unverified_warnings(report: Mapping[str, Any]) -> list[str]:
    """Return a warning for each system whose failure rate the StABlE phase has not shown to be as low as asked for."""
    found = [Verification(**entry) for entry in report.get("verifications") or []]
    return [f"{str(each)[0].upper()}{str(each)[1:]} Raise max_windows." for each in found if not each.is_verified]
