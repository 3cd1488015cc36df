"""Report as one self-contained HTML page, rendered with Jinja2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.definitions import definitions
from stable_plugin.evaluation.figure_style import PALETTE, STAGES, inline_svg
from stable_plugin.evaluation.figures import Drawing
from stable_plugin.evaluation.formatting import number
from stable_plugin.evaluation.report_warnings import report_warnings
from stable_plugin.evaluation.systems_table import systems_table
from stable_plugin.evaluation.wording import EvaluationSummary

_MAX_LIST_ITEMS = 12
"""Longer lists in the settings are cut on the page; report.json has them in full."""

_WINDOW_COLUMNS = {
    "window": "Window",
    "phase": "Phase",
    "temperature_K": "Temperature / K",
    "simulated_ps": "Simulated time / ps",
    "unstable_fraction": "Unstable replicas",
    "bound_per_ns": "Failures at most / 1/ns",
    "observable_loss": "Observable loss",
    "ess_fraction": "ESS fraction",
    "steps": "Optimizer steps",
    "learning_rate": "Learning rate",
    "wall_s": "Wall time / s",
}

_FRACTIONS = ("unstable_fraction", "ess_fraction")


@dataclass(frozen=True)
class Tile:
    """One key number of a report, for each compared stage.

    Attributes:
        label: Heading.
        values: Value by stage.
        unit: Unit of the values.
        notes: Lines below the values.
    """

    label: str
    values: Mapping[str, str]
    unit: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Row:
    """One row of the table of all numbers, with a cell per stage."""

    label: str
    cells: Sequence[str]


@dataclass(frozen=True)
class RowGroup:
    """Rows of the table of all numbers under a common heading."""

    label: str
    rows: Sequence[Row]


def render(report: Mapping[str, Any], drawings: Sequence[Drawing], axes: Mapping[str, Any]) -> str:
    """Render the page.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        drawings: Figures in reading order.
        axes: ``curves["axes"]``, for the units of the observables.

    Returns:
        An HTML document. All text of the report is escaped, and the content policy forbids scripts and loading.
    """
    stages = wording.evaluations(report)
    template = _environment().get_template("report.html.j2")
    return template.render(
        palette=PALETTE,
        title=str(report["title"]),
        outcome=wording.outcome(report),
        verdict=wording.stability(report),
        headline=wording.headline(report),
        findings=wording.findings(report, axes),
        all_systems=str(report.get("all_systems") or ""),
        systems=systems_table(report),
        warnings=report_warnings(report),
        tiles=_tiles(stages | wording.evaluations(report, "extended")),
        figures=[_figure(drawing) for drawing in drawings],
        stages={stage: STAGES[stage].label for stage in stages},
        groups=_groups(report, axes),
        window_columns=list(_window_columns(report).values()),
        window_rows=[_window_cells(entry, _window_columns(report)) for entry in report.get("windows") or []],
        settings=_settings(report["settings"]) if report.get("settings") else None,
        definitions=definitions(report),
        footer=_footer(report),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("stable_plugin.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _tiles(stages: Mapping[str, EvaluationSummary]) -> list[Tile]:
    """Return the key numbers of the compared stages, each with its label, unit and notes."""
    compared = {stage: stages[stage] for stage in ("before", "after", "evaluation") if stage in stages}
    last = list(compared.values())[-1]
    same_number = len({summary["replicas"] for summary in compared.values()}) == 1

    def tile(label: str, value: Callable[[EvaluationSummary], str], unit: str, notes: Sequence[str]) -> Tile:
        return Tile(label, {stage: value(summary) for stage, summary in compared.items()}, unit, notes)

    def for_all_stages(value: Callable[[EvaluationSummary], str]) -> list[str]:
        return [
            value(summary) if stage == "evaluation" else f"{stage}: {value(summary)}"
            for stage, summary in stages.items()
        ]

    tiles = [
        tile(
            f"Failed within {number(last['horizon_ps'])} ps",
            lambda summary: f"{summary['unstable']}" if same_number else f"{summary['unstable']}/{summary['replicas']}",
            f"of {last['replicas']} replicas" if same_number else "replicas",
            for_all_stages(_failed_percent),
        ),
        tile("Failures per ns", _short_rate, "", for_all_stages(_rate_interval)),
        tile(
            "Median stable time",
            _short_median,
            "ps",
            [
                "until half of the replicas failed",
                *([f"control: {wording.median(stages['control'])}"] if "control" in stages else []),
            ],
        ),
    ]
    if any(summary.get("force_mae_mev_per_A") is not None for summary in compared.values()):
        change = [wording.force_change(stages["before"], stages["after"])] if "before" in stages else []
        notes = ["mean absolute error", *change]
        tiles.append(tile("Force error, held out", partial(_number_of, key="force_mae_mev_per_A"), "meV/Å", notes))
    return tiles


def _failed_percent(summary: EvaluationSummary) -> str:
    return f"{100 * summary['unstable'] / summary['replicas']:.0f} %"


def _number_of(summary: EvaluationSummary, key: str) -> str:
    return number(summary.get(key))


def _short_median(summary: EvaluationSummary) -> str:
    if summary.get("median_stable_ps") is None:
        return f"> {number(summary['horizon_ps'])}"
    return number(summary["median_stable_ps"])


def _short_rate(summary: EvaluationSummary) -> str:
    if summary["unstable"] == 0:
        return f"≤ {number(summary['failures_per_ns_interval'][1])}"
    return number(summary["failures_per_ns"])


def _rate_interval(summary: EvaluationSummary) -> str:
    if summary["unstable"] == 0:
        return wording.rate(summary)
    low, high = summary["failures_per_ns_interval"]
    return f"{number(low)} – {number(high)} (95 %)"


def _figure(drawing: Drawing) -> dict[str, Any]:
    # inline_svg escapes all text itself, so its markup must not be escaped again.
    svg = Markup(inline_svg(drawing.figure, drawing.name, f"{drawing.title}. {drawing.caption}"))
    return {"title": drawing.title, "svg": svg, "caption": drawing.caption}


def _groups(report: Mapping[str, Any], axes: Mapping[str, Any]) -> list[RowGroup]:
    """Return the table of all numbers as groups of rows, with one cell per stage."""
    stages, extended = wording.evaluations(report), wording.evaluations(report, "extended")
    horizon = number(next(iter(stages.values()))["horizon_ps"])
    groups = [RowGroup(f"Simulations of {horizon} ps", _simulation_rows(stages, stages, axes))]
    if extended:
        horizon = number(next(iter(extended.values()))["horizon_ps"])
        rows = _simulation_rows(stages, extended, axes)
        groups.append(RowGroup(f"The same replicas up to {horizon} ps", rows))
    errors = {
        "force_mae_mev_per_A": "Force MAE / meV/Å",
        "energy_mae_mev_per_atom": "Energy MAE / meV per atom",
        "energy_mae_fitted_zero_mev_per_atom": "Energy MAE, zero fitted per element / meV per atom",
    }
    rows = [
        _row(label, stages, stages, partial(_number_of, key=key))
        for key, label in errors.items()
        if any(summary.get(key) is not None for summary in stages.values())
    ]
    rows += _rows_by(stages, "force_mae_by_element_mev_per_A", "{}: Force MAE / meV/Å")
    rows += _rows_by(stages, "force_mae_by_head_mev_per_A", "Head {}: Force MAE / meV/Å")
    rows += _rows_by(stages, "energy_mae_by_head_mev_per_atom", "Head {}: Energy MAE / meV per atom")
    if rows:
        groups.append(RowGroup("Held-out frames", rows))
    if any(summary.get("preflight") for summary in stages.values()):
        rows = [
            _row("Scans of bonds, angles and contacts that find a hole", stages, stages, _holes),
            _row("Pairs of elements that repel each other at short range", stages, stages, _repulsive_pairs),
        ]
        groups.append(RowGroup("Static checks, without a simulation", rows))
    rows = _condition_rows(stages)
    if rows:
        groups.append(RowGroup("Replicas failed at other temperatures and timesteps", rows))
    return groups


def _holes(summary: EvaluationSummary) -> str:
    found = summary.get("preflight")
    return f"{found['n_holes']} of {found['n_scans']}" if found else "–"


def _repulsive_pairs(summary: EvaluationSummary) -> str:
    pairs = (summary.get("preflight") or {}).get("diatomics")
    return f"{sum(pair['repulsive'] for pair in pairs)} of {len(pairs)}" if pairs else "–"


def _condition_rows(stages: Mapping[str, EvaluationSummary]) -> list[Row]:
    """Return a row for each temperature and timestep at which replicas were simulated besides those of the evaluation."""
    by_stage = {
        stage: {
            f"{number(each['temperature_K'])} K, {number(each['timestep_fs'])} fs, {number(each['horizon_ps'])} ps": each
            for each in summary.get("other_conditions") or []
        }
        for stage, summary in stages.items()
    }
    labels = dict.fromkeys(label for conditions in by_stage.values() for label in conditions)
    return [
        Row(
            label,
            [wording.failed(found[label]) if label in (found := by_stage[stage]) else "–" for stage in stages],
        )
        for label in labels
    ]


def _rows_by(stages: Mapping[str, EvaluationSummary], key: str, label: str) -> list[Row]:
    """Return the rows of an error that is told by element or by head."""
    names = dict.fromkeys(name for summary in stages.values() for name in summary.get(key) or {})
    return [_row(label.format(name), stages, stages, partial(_part_of, key=key, name=name)) for name in names]


def _part_of(summary: EvaluationSummary, key: str, name: str) -> str:
    return number((summary.get(key) or {}).get(name))


def _simulation_rows(
    stages: Mapping[str, EvaluationSummary], part: Mapping[str, EvaluationSummary], axes: Mapping[str, Any]
) -> list[Row]:
    """Return the rows of one horizon: stability, then observables."""
    rows = [
        _row(
            "Replicas failed", stages, part, lambda summary: f"{wording.failed(summary)} ({_failed_percent(summary)})"
        ),
        _row("Median stable time", stages, part, wording.median),
        _row("Failure rate", stages, part, wording.rate),
    ]
    if any(summary.get("splitting") for summary in part.values()):
        rows.append(_row("Failure rate by splitting", stages, part, wording.rate_by_splitting))
    if any(summary.get("offending_atoms") for summary in part.values()):
        rows.append(_row("Atoms that caused failures", stages, part, wording.offending_atoms))
    names = dict.fromkeys(name for summary in part.values() for name in summary.get("observables") or {})
    for name in names:
        unit = wording.unit(axes.get(name) or {})
        label = f"{wording.observable_name(name)}, MAE" + (f" / {unit}" if unit else "")
        rows.append(_row(label, stages, part, partial(wording.observable_error, name=name)))
    units = {
        name: found["unit"]
        for summary in part.values()
        for name, found in (summary.get("observables_w1") or {}).items()
    }
    for name, unit in units.items():
        label = f"{wording.observable_name(name)}, Wasserstein-1 / {unit}"
        rows.append(_row(label, stages, part, partial(wording.distribution_distance, name=name)))
    return rows


def _row(
    label: str,
    stages: Mapping[str, EvaluationSummary],
    part: Mapping[str, EvaluationSummary],
    value: Callable[[EvaluationSummary], str],
) -> Row:
    return Row(label, [value(part[stage]) if stage in part else "–" for stage in stages])


def _window_columns(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the headings of the table of windows by key, with the system where there are several."""
    several = any(entry.get("system") for entry in report.get("windows") or [])
    return {**_WINDOW_COLUMNS, **({"system": "System"} if several else {})}


def _window_cells(entry: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    return [_window_cell(key, entry.get(key)) for key in columns]


def _window_cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key in _FRACTIONS and value is not None:
        return f"{100 * value:.0f} %"
    return number(value, 4)


def _settings(value: Any) -> dict[str, Any] | str:
    """Return settings as nested mappings of text, with long lists cut."""
    if isinstance(value, Mapping) and value:
        return {str(key): _settings(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return {f"{index}": _settings(item) for index, item in enumerate(value, start=1)}
    if isinstance(value, list) and len(value) > _MAX_LIST_ITEMS:
        return f"{_settings(value[:_MAX_LIST_ITEMS])}, … ({len(value)} values)"
    if isinstance(value, list):
        return ", ".join(str(_settings(item)) for item in value) or "[]"
    return value if isinstance(value, str) else json.dumps(value)


def _footer(report: Mapping[str, Any]) -> list[str]:
    return [
        wording.cost(report),
        ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items()),
        "All numbers and curves are in report.json and curves.json next to this page, the figures in the folder figures.",
    ]
