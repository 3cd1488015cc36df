"""Table of all systems of a report, with their total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.figure_style import STAGES
from stable_plugin.evaluation.formatting import number


@dataclass(frozen=True)
class SystemRow:
    """One row of the table of systems.

    Attributes:
        name: Name of the system, or of the total.
        page: Address of its page; empty for this page and for the total.
        cells: Failures, followed time and failure rate of each stage, and the verdict on the last one.
    """

    name: str
    page: str
    cells: Sequence[str]


@dataclass(frozen=True)
class SystemsTable:
    """Table of all systems of a report.

    Attributes:
        columns: Headings.
        rows: One row for each system, and the total last where there are several.
        left_out: Name and reason of each system that was not evaluated.
    """

    columns: Sequence[str]
    rows: Sequence[SystemRow]
    left_out: Mapping[str, str]


def systems_table(report: Mapping[str, Any]) -> SystemsTable | None:
    """Return the table of all systems, or None for a report of one system.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
    """
    systems: Mapping[str, Mapping[str, Any]] = report.get("systems") or {}
    if not systems:
        return None
    stages = list(wording.evaluations(report))
    horizon = number(wording.evaluations(report)[stages[0]]["horizon_ps"])
    columns = ["System"]
    for stage in stages:
        label = "" if stage == "evaluation" else f"{STAGES[stage].label}: "
        columns += [f"{label}failed within {horizon} ps", f"{label}followed", f"{label}failures per ns"]
    rows = [
        SystemRow(name, "" if name == report.get("system") else each["page"], _cells(each))
        for name, each in systems.items()
    ]
    if len(rows) > 1:
        rows.append(SystemRow(f"All {len(rows)} systems", "", _cells(report["total"])))
    return SystemsTable([*columns, "Verdict"], rows, report.get("not_evaluated") or {})


def _cells(stages: Mapping[str, Any]) -> list[str]:
    cells: list[str] = []
    for summary in wording.evaluations(stages).values():
        cells += [wording.failed(summary), _followed(summary), wording.rate(summary)]
    return [*cells, wording.last_verdict(stages)["state"]]


def _followed(summary: Mapping[str, Any]) -> str:
    return f"{number(1000.0 * summary['verdict']['followed_ns'])} ps"
