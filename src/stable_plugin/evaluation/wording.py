"""Sentences of a report: the verdict on a run, its findings and its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from scipy import stats

from stable_plugin.evaluation.formatting import duration, number
from stable_plugin.evaluation.verdict import sentence, splitting_rate

EvaluationSummary = Mapping[str, Any]
Verdict = Literal["better", "worse", "unclear"]

SIGNIFICANCE = 0.05
"""Failure counts differ if the p value of Fisher's exact test is below this."""

_MIN_CHANGE = 0.02
"""Relative change of an error below which it is reported as unchanged."""

_MIN_HEADLINE_GROWTH = 0.05
"""Relative growth of the force error above which the headline mentions it."""

_MAX_EXAMPLES = 3
"""Most failures that are described on the page; report.json has all of them."""

_WHERE = {"before": " before", "control": " in the control", "after": " after", "evaluation": ""}
"""Words for a stage at the end of a count."""

_OBSERVABLE_NAMES = {
    "bond_lengths": "Bond lengths",
    "distance_distribution": "Distance distribution h(r)",
    "angle_distribution": "Bond angle distribution",
}


def evaluations(report: Mapping[str, Any], part: str | None = None) -> dict[str, EvaluationSummary]:
    """Return the evaluated models of a report by stage: before, control, after, or evaluation alone.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        part: ``"extended"`` for the longer horizon.

    Returns:
        The stages that are present, in the order of the report.
    """
    source = report if part is None else report.get(part) or {}
    return {stage: source[stage] for stage in ("before", "control", "after", "evaluation") if source.get(stage)}


def verdict(before: EvaluationSummary, after: EvaluationSummary) -> Verdict:
    """Return whether the fraction of failed replicas fell, rose, or did not change significantly."""
    if p_value(before, after) >= SIGNIFICANCE:
        return "unclear"
    survivors = before["replicas"] - before["unstable"], after["replicas"] - after["unstable"]
    return "better" if survivors[1] / after["replicas"] > survivors[0] / before["replicas"] else "worse"


def p_value(first: EvaluationSummary, second: EvaluationSummary) -> float:
    """Return the two-sided p value of Fisher's exact test for equal failure probabilities."""
    table = [[summary["unstable"], summary["replicas"] - summary["unstable"]] for summary in (first, second)]
    return float(stats.fisher_exact(table)[1])


def outcome(report: Mapping[str, Any]) -> Verdict:
    """Return the verdict on the run, at the longer horizon if the first one shows no significant difference."""
    stages = evaluations(report)
    if "before" not in stages or not _are_comparable(stages["before"], stages["after"]):
        return "unclear"
    return verdict(*_headline_pair(report))


def headline(report: Mapping[str, Any]) -> str:
    """Return one sentence with the result of the run."""
    text = _headline(report)
    return f"{report['system']}: {text}" if report.get("system") else text


def _headline(report: Mapping[str, Any]) -> str:
    stages, extended = evaluations(report), evaluations(report, "extended")
    if "before" not in stages:
        return single_evaluation(stages["evaluation"])
    if not _are_comparable(stages["before"], stages["after"]):
        return "Before and after cannot be compared: they were evaluated with different horizons or detectors."
    before, after = _headline_pair(report)
    text = _comparison(before, after)
    later = extended.get("after")
    if outcome(report) == "better" and later and later["horizon_ps"] > after["horizon_ps"]:
        lasts = "before" in extended and verdict(extended["before"], later) == "better"
        if not lasts or later["unstable"] > later["replicas"] / 2:
            text += f"; within {number(later['horizon_ps'])} ps, {failed(later)} fail even after training"
    growth = force_growth(before, after)
    if growth is not None and growth > _MIN_HEADLINE_GROWTH:
        text += f"; the force error grew by {100 * growth:.0f} %"
    return text + "."


def stability(report: Mapping[str, Any]) -> str:
    """Return the verdict on the last model of a report, from the longest time that it was followed; empty if there is none.

    Where the report has several systems, it is that on all together, and those that fail by themselves are named.
    """
    systems = report.get("systems") or {}
    if len(systems) < 2:
        verdict = last_verdict(report)
        return f"{sentence(verdict)}{_off_reference(report)}" if verdict else ""
    state, _, reason = sentence(last_verdict(report["total"])).partition(":")
    failing = [name for name, each in systems.items() if last_verdict(each)["state"] == "fails"]
    named = "" if state == "Fails" or not failing else f" Fails by itself: {', '.join(failing)}."
    return f"{state}, {len(systems)} systems together:{reason}{named}"


def _off_reference(report: Mapping[str, Any]) -> str:
    """Return which distributions of the last model differ from the reference, as a further sentence; empty if none does."""
    last = list({**evaluations(report), **evaluations(report, "extended")}.values())[-1]
    found = (last.get("observables_w1") or {}).items()
    texts = [name_in_sentence(name) for name, each in found if each.get("exceeded")]
    return f" But its structure is off the reference: {', '.join(texts)}." if texts else ""


def last_verdict(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the verdict on the last model, from the longest time that it was followed; empty if there is none."""
    last = list({**evaluations(report), **evaluations(report, "extended")}.values())[-1]
    return last.get("verdict") or {}


def single_evaluation(summary: EvaluationSummary) -> str:
    """Return the headline of a model that is not compared with another one."""
    within = f"within {number(summary['horizon_ps'])} ps"
    if summary["unstable"] == 0:
        return f"None of {summary['replicas']} replicas failed {within}: {rate(summary)}."
    return f"{failed(summary)} replicas failed {within}."


def findings(report: Mapping[str, Any], axes: Mapping[str, Any]) -> list[str]:
    """Return further sentences: longer horizon, control, force error, observables.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        axes: ``curves["axes"]``, for the units of the observables.

    Returns:
        One text per finding.
    """
    stages, extended = evaluations(report), evaluations(report, "extended")
    lines = []
    if extended:
        horizon = number(next(iter(extended.values()))["horizon_ps"])
        counts = [f"{failed(summary)}{_WHERE[stage]}" for stage, summary in extended.items()]
        lines.append(f"Failed within {horizon} ps: {', '.join(counts)}.")
    lines += _examples({**stages, **extended})
    lines += _distribution_sentences(list({**stages, **extended}.values())[-1])
    lines += _zero_sentence(stages)
    if "before" not in stages:
        return lines
    before, after = stages["before"], stages["after"]
    if "control" in stages:
        lines.append(_control_sentence(stages["control"], after, improved=verdict(before, after) == "better"))
    if force_growth(before, after) is not None:
        lines.append(_force_sentence(before, after))
    return lines + _observable_sentences(before, after, axes)


def failed(summary: EvaluationSummary) -> str:
    """Return the number of failures, as in ``27 of 32``."""
    return f"{summary['unstable']} of {summary['replicas']}"


def median(summary: EvaluationSummary) -> str:
    """Return the median stable time, or that it was not reached."""
    time = summary.get("median_stable_ps")
    if time is None:
        return f"not reached within {number(summary['horizon_ps'])} ps"
    return f"{number(time)} ps"


def rate(summary: EvaluationSummary) -> str:
    """Return the failure rate with its interval; without failures, the upper bound."""
    low, high = summary["failures_per_ns_interval"]
    if summary["unstable"] == 0:
        return f"0 failures seen, at most {number(high)} per ns (95 %)"
    return f"{number(summary['failures_per_ns'])} per ns (95 %: {number(low)} to {number(high)})"


def rate_by_splitting(summary: EvaluationSummary) -> str:
    """Return the failure rate by splitting with its interval, and the simulated time that it took."""
    found = summary.get("splitting")
    return f"{splitting_rate(found)}, from {number(found['followed_ns'])} ns" if found else "–"


def offending_atoms(summary: EvaluationSummary) -> str:
    """Return the atoms that caused failures, the most frequent first."""
    counts = summary.get("offending_atoms") or {}
    return ", ".join(label if count == 1 else f"{label} ({count} times)" for label, count in counts.items()) or "–"


def observable_error(summary: EvaluationSummary, name: str) -> str:
    """Return the mean absolute error of an observable, with its standard error if it is known."""
    error = _standard_error(summary, name)
    text = number((summary.get("observables") or {}).get(name))
    return text if error is None else f"{text} ± {number(error, 2)}"


def distribution_distance(summary: EvaluationSummary, name: str) -> str:
    """Return the Wasserstein distance of a distribution from the reference, and how it compares with the reference's own."""
    found = (summary.get("observables_w1") or {}).get(name) or {}
    value, level = number(found.get("value")), number(found.get("reference_level"))
    if found.get("exceeded") is None:
        return value
    where = f" at {found['where']}" if found.get("where") else ""
    return f"{value}{where}, above {level}" if found["exceeded"] else f"{value}, within {level}"


def observable_name(name: str) -> str:
    """Return the name of an observable for a heading, such as ``Radial distribution O-H``."""
    if name in _OBSERVABLE_NAMES:
        return _OBSERVABLE_NAMES[name]
    parts = name.split("_")
    words, elements = ([part for part in parts if part[:1].isupper() == upper] for upper in (False, True))
    title = " ".join([*words, "-".join(elements)]).strip()
    return f"{title[:1].upper()}{title[1:]}"


def name_in_sentence(name: str) -> str:
    """Return the name of an observable within a sentence, such as ``radial distribution O-H``."""
    title = observable_name(name)
    return f"{title[:1].lower()}{title[1:]}"


def unit(axis: Mapping[str, Any]) -> str:
    """Return the unit of an observable from an axis label such as ``length / Å``."""
    return str(axis.get("ylabel", "")).partition(" / ")[2]


def force_growth(before: EvaluationSummary, after: EvaluationSummary) -> float | None:
    """Return the relative growth of the force error, or None if it is not known."""
    old, new = before.get("force_mae_mev_per_A"), after.get("force_mae_mev_per_A")
    return new / old - 1 if old is not None and old > 0 and new is not None else None


def force_change(before: EvaluationSummary, after: EvaluationSummary) -> str:
    """Return how the force error changed, in words."""
    growth = force_growth(before, after)
    if growth is None:
        return "change unknown"
    if abs(growth) < _MIN_CHANGE:
        return "about the same"
    return f"{100 * abs(growth):.0f} % {'larger' if growth > 0 else 'smaller'} than before"


def cost(report: Mapping[str, Any]) -> str:
    """Return what the run took: windows, steps and time; empty if the report does not hold them."""
    windows, steps = report.get("windows") or [], report.get("optimizer_steps")
    parts = []
    if windows:
        parts.append(f"{len(windows)} {'window' if len(windows) == 1 else 'windows'}")
    if windows or steps:
        parts.append(f"{steps or 0:,} optimizer {'step' if steps == 1 else 'steps'}")
    if report.get("md_steps") is not None:
        parts.append(f"{report['md_steps']:,} MD steps")
    if report.get("wall_s") is not None:
        parts.append(duration(report["wall_s"]))
    return f"{'StABlE phase' if 'before' in report else 'Evaluation'}: {', '.join(parts)}." if parts else ""


def _examples(stages: Mapping[str, EvaluationSummary]) -> list[str]:
    """Return the first failures of the last model, those of different atoms."""
    last = list(stages.values())[-1]
    by_atoms = {
        " ".join(each["what"].split()[:2]): each for each in reversed(last.get("failures") or []) if each["what"]
    }
    first = sorted(by_atoms.values(), key=lambda each: float(each["time_ps"]))[:_MAX_EXAMPLES]
    return [f"After {number(each['time_ps'])} ps in replica {each['replica']}: {each['what']}." for each in first]


def _distribution_sentences(last: EvaluationSummary) -> list[str]:
    """Return which distributions of the last model are further from the reference than its own parts from each other."""
    texts = [
        f"{name_in_sentence(name)} {distribution_distance(last, name)} {found['unit']}"
        for name, found in (last.get("observables_w1") or {}).items()
        if found.get("exceeded")
    ]
    return [f"Distributions that differ from the reference (Wasserstein-1): {'; '.join(texts)}."] if texts else []


def _zero_sentence(stages: Mapping[str, EvaluationSummary]) -> list[str]:
    """Return that the zero of energy has been fitted, and why, in a list; an empty one if it has not."""
    fitted = {
        stage: f"{number(summary['energy_mae_mev_per_atom'])} → "
        f"{number(summary['energy_mae_fitted_zero_mev_per_atom'])} meV per atom"
        + ("" if stage == "evaluation" else f" {_WHERE[stage].strip()}")
        for stage, summary in stages.items()
        if summary.get("energy_mae_fitted_zero_mev_per_atom") is not None
    }
    if not fitted:
        return []
    return [
        "The zero of energy of the model is not that of the labels, as after a short fit or with isolated atoms of another code: one "
        f"energy per element explains most of the error. Energy MAE as it is → with this zero fitted per element: "
        f"{', '.join(fitted.values())}. Forces do not depend on it."
    ]


def _headline_pair(report: Mapping[str, Any]) -> tuple[EvaluationSummary, EvaluationSummary]:
    """Return before and after at the horizon of the headline."""
    stages, extended = evaluations(report), evaluations(report, "extended")
    first = stages["before"], stages["after"]
    if verdict(*first) != "unclear" or not {"before", "after"} <= set(extended):
        return first
    later = extended["before"], extended["after"]
    no_failures = first[0]["unstable"] == first[1]["unstable"] == 0
    return later if no_failures or verdict(*later) != "unclear" else first


def _comparison(before: EvaluationSummary, after: EvaluationSummary) -> str:
    within = f"within {number(after['horizon_ps'])} ps"
    counts = f"{failed(before)} before, {failed(after)} after"
    result = verdict(before, after)
    if result == "better":
        most = ", but most still do" if after["unstable"] > after["replicas"] / 2 else ""
        return f"Fewer replicas fail{most}: {counts}, {within}"
    if result == "worse":
        return f"Worse than before, more replicas fail: {counts}, {within}"
    if before["unstable"] == after["unstable"] == 0:
        return f"No replica failed {within}, before or after, so there is no evidence that training helped"
    return f"No significant difference in stability: {counts}, {within} (p = {number(p_value(before, after), 2)})"


def _are_comparable(before: EvaluationSummary, after: EvaluationSummary) -> bool:
    return all(before.get(key) == after.get(key) for key in ("horizon_ps", "threshold", "detector"))


def _force_sentence(before: EvaluationSummary, after: EvaluationSummary) -> str:
    key = "force_mae_mev_per_A"
    numbers = f"{number(before.get(key))} → {number(after.get(key))} meV/Å"
    return f"Force MAE on held-out frames: {numbers}, {force_change(before, after)}."


def _control_sentence(control: EvaluationSummary, after: EvaluationSummary, improved: bool) -> str:
    comparisons: dict[Verdict, str] = {
        "better": "significantly more than after StABlE training",
        "worse": "significantly fewer than after StABlE training, so the repair made it worse",
        "unclear": "not significantly different from StABlE training",
    }
    result = verdict(control, after)
    text = (
        f"Control, trained for as long with energies and forces alone: {failed(control)} failed, {comparisons[result]}"
    )
    if result == "unclear" and improved:
        text += ", so there is no evidence that the repair caused the improvement"
    return text + "."


def _observable_sentences(before: EvaluationSummary, after: EvaluationSummary, axes: Mapping[str, Any]) -> list[str]:
    """Return which observables moved towards the reference, and which away from it."""
    old, new = before.get("observables") or {}, after.get("observables") or {}
    moved: dict[bool, list[str]] = {True: [], False: []}
    for name, error in old.items():
        if error is None or new.get(name) is None:
            continue
        if abs(new[name] - error) > max(_MIN_CHANGE * error, 2.0 * _change_error(before, after, name)):
            change = f"{number(error)} → {number(new[name])} {unit(axes.get(name) or {})}".rstrip()
            moved[new[name] < error].append(f"{name_in_sentence(name)} ({change})")
    words = {True: "closer to", False: "further from"}
    return [
        f"In simulations, {words[closer]} the reference (mean absolute error): {', '.join(names)}."
        for closer, names in moved.items()
        if names
    ]


def _change_error(before: EvaluationSummary, after: EvaluationSummary, name: str) -> float:
    """Return the standard error of the change of an observable's error, 0 if it is not known."""
    return math.hypot(*(_standard_error(summary, name) or 0.0 for summary in (before, after)))


def _standard_error(summary: EvaluationSummary, name: str) -> float | None:
    return (summary.get("observables_standard_error") or {}).get(name)
