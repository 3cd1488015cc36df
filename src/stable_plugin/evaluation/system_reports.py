"""Reports of several systems: one for each, and a table of all with their total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_plugin.evaluation.report import write_report
from stable_plugin.evaluation.summaries import Evaluation
from stable_plugin.evaluation.verdict import judge

FOLDER = "systems"
"""Folder of the reports of all systems but the first one."""


@dataclass(frozen=True)
class SystemReport:
    """Report of one system.

    Attributes:
        folder: Folder relative to that of the run.
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        curves: Likewise.
    """

    folder: Path
    report: dict[str, Any]
    curves: dict[str, Any]


def system_reports(common: Mapping[str, Any], stages: Mapping[str, Evaluation | None]) -> list[SystemReport]:
    """Return the report of each system, the first one with the table of all systems.

    Args:
        common: What is not of one system: ``title``, ``settings``, ``windows`` and so on.
        stages: Result of each stage, in the order of the report; None for a stage that was left out.

    Raises:
        ValueError: If no system was evaluated in all stages.
    """
    present = {stage: result for stage, result in stages.items() if result is not None}
    first = next(iter(present.values()))
    names = [name for name in first.systems if all(name in each.systems for each in present.values())]
    if not names:
        reasons = {name: reason for each in present.values() for name, reason in each.not_evaluated.items()}
        raise ValueError(f"no system could be evaluated in all of the stages {', '.join(present)}: {reasons}.")
    not_evaluated = _not_evaluated(present, names)
    if len(names) == 1 and not not_evaluated:
        return [SystemReport(Path(), {**common, **_stages(stages, names[0])}, _curves(present, names[0]))]
    root, *others = (_system_report(common, stages, name, is_first=name == names[0]) for name in names)
    every = {
        name: {"page": (each.folder / "report.html").as_posix(), **_stages(stages, name)}
        for name, each in zip(names, [root, *others], strict=True)
    }
    root.report["systems"] = every
    root.report["total"] = _totals([each.report for each in (root, *others)], list(present))
    root.report["not_evaluated"] = not_evaluated
    root.report["failed_systems"] = sorted({name for each in present.values() for name in each.failed})
    return [root, *others]


def write_system_reports(run_dir: Path, reports: list[SystemReport]) -> Path:
    """Write the reports of all systems, that of the first one last.

    Args:
        run_dir: Folder of the run.
        reports: From :func:`system_reports`.

    Returns:
        Path of the page of the first system, which links to the others.
    """
    root, *others = reports
    for each in others:
        write_report(run_dir / each.folder, each.report, each.curves)
    return write_report(run_dir, root.report, root.curves)


def _totals(reports: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    """Return the totals of each stage, and those of the longest horizon if there are several."""
    totals: dict[str, Any] = {stage: total([each[stage] for each in reports]) for stage in stages}
    longer = [each["extended"] for each in reports]
    totals["extended"] = {stage: total([each[stage] for each in longer]) for stage in stages} if all(longer) else None
    return totals


def total(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return failures, followed time and verdict of several systems together.

    Args:
        summaries: Numbers of each system.
    """
    verdicts = [each["verdict"] for each in summaries]
    verdict = judge(
        sum(each["failures"] for each in verdicts),
        1000.0 * sum(each["followed_ns"] for each in verdicts),
        "the detectors of all systems",
        max(each["max_failures_per_ns"] for each in verdicts),
    )
    return {
        "replicas": sum(each["replicas"] for each in summaries),
        "unstable": verdict.failures,
        "failures_per_ns": verdict.failures_per_ns,
        "failures_per_ns_interval": list(verdict.interval),
        "verdict": verdict.as_dict(),
    }


def _system_report(
    common: Mapping[str, Any], stages: Mapping[str, Evaluation | None], name: str, *, is_first: bool
) -> SystemReport:
    present = {stage: result for stage, result in stages.items() if result is not None}
    place: dict[str, Any] = {"title": f"{common['title']}: {name}", "system": name}
    if is_first:
        return SystemReport(Path(), {**common, **place, **_stages(stages, name)}, _curves(present, name))
    # What the run has cost is on the page of all systems.
    shared = {key: common[key] for key in ("settings", "versions") if key in common}
    folder = Path(FOLDER, name)
    return SystemReport(
        folder, {**shared, **place, "all_systems": "../../report.html", **_stages(stages, name)}, _curves(present, name)
    )


def _stages(stages: Mapping[str, Evaluation | None], name: str) -> dict[str, Any]:
    """Return the numbers of one system in each stage, and those of the longest horizon if there are several."""
    own = {stage: result and result.systems[name].summaries for stage, result in stages.items()}
    longer = any(summaries and len(summaries) > 1 for summaries in own.values())
    return {
        **{stage: summaries and summaries[0] for stage, summaries in own.items()},
        "extended": {stage: summaries and summaries[-1] for stage, summaries in own.items()} if longer else None,
    }


def _curves(present: Mapping[str, Evaluation], name: str) -> dict[str, Any]:
    own = {stage: result.systems[name] for stage, result in present.items()}
    return {**{stage: each.curves for stage, each in own.items()}, "axes": next(iter(own.values())).axes}


def _not_evaluated(present: Mapping[str, Evaluation], names: list[str]) -> dict[str, str]:
    """Return the reason for each system that has no report; of several stages, that of the first one that lacks it."""
    reasons: dict[str, str] = {}
    for result in present.values():
        for name, reason in result.not_evaluated.items():
            if name not in names:
                reasons.setdefault(name, reason)
    return reasons
