"""Warnings of a report: worse energies or forces, and stability that was not verified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from stable_plugin.config import MAX_ENERGY_MAE_RATIO, MAX_FORCE_MAE_GROWTH, Schedule
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
    """Return a warning for each system whose StABlE phase did not end with a stable simulation."""
    last = {window.get("system", ""): window for window in report.get("windows") or []}
    accepted = _min_unstable_fraction(report.get("settings"))
    return [_unverified_warning(system, window, accepted) for system, window in last.items()]


def _unverified_warning(system: str, last: Mapping[str, Any], accepted: float) -> str:
    unstable = last.get("unstable_fraction")
    if last["phase"] == "learn":
        reason = "the windows were used up and the last one was a learning window"
    elif unstable is not None and unstable > accepted:
        reason = "the last window was unstable"
    else:
        return ""
    fraction = "" if unstable is None else f", with {100 * unstable:.0f} % of the replicas unstable in it"
    of_system = f" of {system}" if system else ""
    return f"Stability{of_system} was not verified by the StABlE phase: {reason}{fraction}. Raise max_windows of the schedule."


def _min_unstable_fraction(settings: Any) -> float:
    """Return the fraction of unstable replicas that the schedule accepts, wherever it stands in the settings."""
    found = _find(settings, "min_unstable_fraction")
    return float(found) if isinstance(found, int | float) else Schedule.min_unstable_fraction


def _find(settings: Any, key: str) -> Any:
    """Return the first value of a key in nested mappings, or None."""
    if not isinstance(settings, Mapping):
        return None
    if key in settings:
        return settings[key]
    return next((found for value in settings.values() if (found := _find(value, key)) is not None), None)
