"""What the numbers of a report say, in words: a worse result reads as worse, a chance result as unclear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from scipy import stats

Evaluation = Mapping[str, Any]
Verdict = Literal["better", "worse", "unclear"]

SIGNIFICANCE = 0.05
"""A difference counts as one when Fisher's exact test gives less."""

_SAME = 0.02
"""Relative change of an error below which it is called unchanged."""

_NOTABLE = 0.05
"""Relative growth of the force error from which the headline mentions it."""

_NAMES = {
    "bond_lengths": "Bond lengths",
    "distance_distribution": "Distance distribution h(r)",
    "angle_distribution": "Bond angle distribution",
}


def evaluations(report: Mapping[str, Any], part: str | None = None) -> dict[str, Evaluation]:
    """The evaluated models of a report by stage: before, control, after, or evaluation alone.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        part: ``"extended"`` for the longer runs.

    Returns:
        Stages that are present, in the order in which they are told.
    """
    source = report if part is None else report.get(part) or {}
    return {stage: source[stage] for stage in ("before", "control", "after", "evaluation") if source.get(stage)}


def verdict(before: Evaluation, after: Evaluation) -> Verdict:
    """Whether the share of failing replicas fell, rose, or cannot be told apart (Fisher's exact test)."""
    kept = before["replicas"] - before["unstable"], after["replicas"] - after["unstable"]
    if p_value(before, after) >= SIGNIFICANCE:
        return "unclear"
    return "better" if kept[1] / after["replicas"] > kept[0] / before["replicas"] else "worse"


def p_value(first: Evaluation, second: Evaluation) -> float:
    """Two-sided p of Fisher's exact test that two evaluations share one probability of failing."""
    table = [[e["unstable"], e["replicas"] - e["unstable"]] for e in (first, second)]
    return float(stats.fisher_exact(table)[1])


def outcome(report: Mapping[str, Any]) -> Verdict:
    """The verdict on the whole run: of the first horizon, or of the longer one where the first cannot tell."""
    told = evaluations(report)
    if "before" not in told or not _alike(told["before"], told["after"]):
        return "unclear"
    return verdict(*_telling_pair(report))


def headline(report: Mapping[str, Any]) -> str:
    """One sentence that says how the run ended."""
    told, longer = evaluations(report), evaluations(report, "extended")
    if "before" not in told:
        return alone(told["evaluation"])
    if not _alike(told["before"], told["after"]):
        return "Before and after were not evaluated alike, so they cannot be compared."
    before, after = _telling_pair(report)
    text = _compared(before, after)
    late = longer.get("after")
    if outcome(report) == "better" and late and late["horizon_ps"] > after["horizon_ps"]:
        lasting = "before" in longer and verdict(longer["before"], late) == "better"
        if not lasting or late["unstable"] > late["replicas"] / 2:
            text += f"; followed to {number(late['horizon_ps'])} ps, {failed(late)} fail even after training"
    growth = _growth(before, after)
    if growth is not None and growth > _NOTABLE:
        text += f"; the force error grew by {100 * growth:.0f} %"
    return text + "."


def alone(evaluation: Evaluation) -> str:
    """The sentence for a model that is compared with nothing."""
    within = f"within {number(evaluation['horizon_ps'])} ps"
    if evaluation["unstable"] == 0:
        return f"None of {evaluation['replicas']} replicas failed {within}: {rate(evaluation)}."
    return f"{failed(evaluation)} replicas failed {within}."


def findings(report: Mapping[str, Any], axes: Mapping[str, Any]) -> list[str]:
    """Further sentences: longer runs, control, accuracy, observables.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        axes: ``curves["axes"]``, for the units of the observables.
    """
    told, longer = evaluations(report), evaluations(report, "extended")
    lines = []
    if longer:
        horizon = number(next(iter(longer.values()))["horizon_ps"])
        where = {"before": " before", "control": " in the control", "after": " after", "evaluation": ""}
        counts = [f"{failed(e)}{where[stage]}" for stage, e in longer.items()]
        lines.append(f"Failed when followed to {horizon} ps: {', '.join(counts)}.")
    if "before" not in told:
        return lines
    before, after = told["before"], told["after"]
    if "control" in told:
        lines.append(_against_control(told["control"], after, helped=verdict(before, after) == "better"))
    if _growth(before, after) is not None:
        lines.append(_force_sentence(before, after))
    for words, closer in (("closer to", True), ("further from", False)):
        moved = [
            f"{observable(name)[0].lower()}{observable(name)[1:]} "
            f"({number(old)} → {number(new)} {unit(axes.get(name) or {})}".rstrip()
            + ")"
            for name, old, new in _errors(before, after)
            if abs(new - old) > max(_SAME * old, 2.0 * _uncertainty(before, after, name)) and (new < old) is closer
        ]
        if moved:
            lines.append(f"In simulations, {words} the reference (mean absolute error): {', '.join(moved)}.")
    return lines


def failed(evaluation: Evaluation) -> str:
    """Failures of all replicas, as in ``27 of 32``."""
    return f"{evaluation['unstable']} of {evaluation['replicas']}"


def median(evaluation: Evaluation) -> str:
    """Median stable time, or that it lies beyond the run."""
    time = evaluation.get("median_stable_ps")
    if time is None:
        return f"not reached within {number(evaluation['horizon_ps'])} ps"
    return f"{number(time)} ps"


def rate(evaluation: Evaluation) -> str:
    """Failure rate with its interval; never a bare zero."""
    low, high = evaluation["failures_per_ns_interval"]
    if evaluation["unstable"] == 0:
        return f"0 failures seen, at most {number(high)} per ns (95 %)"
    return f"{number(evaluation['failures_per_ns'])} per ns (95 %: {number(low)} to {number(high)})"


def broken(evaluation: Evaluation) -> str:
    """The atoms that failures were about, those of most failures first."""
    counts = evaluation.get("broken_atoms") or {}
    return ", ".join(label if count == 1 else f"{label} ({count} times)" for label, count in counts.items()) or "–"


def deviation(evaluation: Evaluation, name: str) -> str:
    """Mean absolute error of an observable, with its standard error where that is known."""
    error = _standard_error(evaluation, name)
    text = number((evaluation.get("observables") or {}).get(name))
    return text if error is None else f"{text} ± {number(error, 2)}"


def observable(name: str) -> str:
    """Name of an observable for a heading."""
    return _NAMES.get(name) or name.replace("_", " ").capitalize()


def unit(axis: Mapping[str, Any]) -> str:
    """Unit of an observable, from an axis label such as ``length / Å``."""
    return str(axis.get("ylabel", "")).partition(" / ")[2]


def force_change(before: Evaluation, after: Evaluation) -> str:
    """How the force error changed, in words."""
    growth = _growth(before, after)
    if growth is None:
        return "change unknown"
    if abs(growth) < _SAME:
        return "about the same"
    return f"{100 * abs(growth):.0f} % {'larger' if growth > 0 else 'smaller'} than before"


def duration(seconds: float) -> str:
    """Wall time as people say it."""
    if seconds < 600:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cost(report: Mapping[str, Any]) -> str:
    """What the run took: windows, steps, time; empty if the report says nothing about it."""
    rounds, steps = report.get("windows") or [], report.get("optimizer_steps")
    parts = []
    if rounds:
        parts.append(f"{len(rounds)} {'window' if len(rounds) == 1 else 'windows'}")
    if rounds or steps:
        parts.append(f"{steps or 0:,} optimizer {'step' if steps == 1 else 'steps'}")
    if report.get("md_steps") is not None:
        parts.append(f"{report['md_steps']:,} MD steps")
    if report.get("wall_s") is not None:
        parts.append(duration(report["wall_s"]))
    return f"{'StABlE phase' if 'before' in report else 'Evaluation'}: {', '.join(parts)}." if parts else ""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, thousands separated; a dash for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 9:
        return f"{value:.{digits - 1}e}"
    text = f"{round(value, digits - 1 - exponent):,.{max(digits - 1 - exponent, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _telling_pair(report: Mapping[str, Any]) -> tuple[Evaluation, Evaluation]:
    """Before and after, at the horizon that the headline speaks of."""
    told, longer = evaluations(report), evaluations(report, "extended")
    first = told["before"], told["after"]
    if verdict(*first) != "unclear" or not {"before", "after"} <= set(longer):
        return first
    late = longer["before"], longer["after"]
    nothing_seen = first[0]["unstable"] == first[1]["unstable"] == 0
    return late if nothing_seen or verdict(*late) != "unclear" else first


def _compared(before: Evaluation, after: Evaluation) -> str:
    within = f"within {number(after['horizon_ps'])} ps"
    counts = f"{failed(before)} before, {failed(after)} after"
    result = verdict(before, after)
    if result == "better":
        most = ", though most still do" if after["unstable"] > after["replicas"] / 2 else ""
        return f"Fewer replicas fail{most}: {counts}, {within}"
    if result == "worse":
        return f"Worse than before, more replicas fail: {counts}, {within}"
    if before["unstable"] == after["unstable"] == 0:
        return f"No replica failed {within}, before or after, so nothing shows that training helped"
    return f"No clear difference in stability: {counts}, {within} (p = {number(p_value(before, after), 2)})"


def _alike(before: Evaluation, after: Evaluation) -> bool:
    return all(before.get(key) == after.get(key) for key in ("horizon_ps", "threshold", "detector"))


def _growth(before: Evaluation, after: Evaluation) -> float | None:
    old, new = before.get("force_mae_mev_per_A"), after.get("force_mae_mev_per_A")
    return new / old - 1 if old is not None and old > 0 and new is not None else None


def _force_sentence(before: Evaluation, after: Evaluation) -> str:
    key = "force_mae_mev_per_A"
    numbers = f"{number(before.get(key))} → {number(after.get(key))} meV/Å"
    return f"Held-out force error (mean absolute): {numbers}, {force_change(before, after)}."


def _against_control(control: Evaluation, after: Evaluation, helped: bool) -> str:
    against = {
        "better": "clearly more than after StABlE",
        "worse": "clearly fewer than after StABlE: the observable did harm",
        "unclear": "not clearly different from after StABlE",
    }
    outcome = verdict(control, after)
    text = f"Control, trained as long without the observable: {failed(control)} failed, {against[outcome]}"
    if outcome == "unclear" and helped:
        text += ", so the observable is not shown to be what helped"
    return text + "."


def _errors(before: Evaluation, after: Evaluation) -> list[tuple[str, float, float]]:
    old, new = before.get("observables") or {}, after.get("observables") or {}
    return [(name, old[name], new[name]) for name in old if old[name] is not None and new.get(name) is not None]


def _uncertainty(before: Evaluation, after: Evaluation, name: str) -> float:
    """Standard error of the change of an observable's error, 0 where it is not known."""
    return math.hypot(*(_standard_error(each, name) or 0.0 for each in (before, after)))


def _standard_error(evaluation: Evaluation, name: str) -> float | None:
    return (evaluation.get("observables_standard_error") or {}).get(name)
