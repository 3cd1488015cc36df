"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.canvas import PALETTE, STAGES, inline_svg
from stable_plugin.evaluation.figures import Drawing
from stable_plugin.evaluation.page_style import PAGE
from stable_plugin.evaluation.wording import Evaluation

_LONGEST_LIST = 12
"""Longer lists in the settings are cut on the page; report.json has them in full."""

_ROUND_COLUMNS = {
    "window": "Window",
    "phase": "Phase",
    "simulated_ps": "Simulated so far / ps",
    "unstable_fraction": "Unstable share",
    "observable_loss": "Observable loss",
    "ess_fraction": "WindowData size left",
    "steps": "Optimizer steps",
    "learning_rate": "Learning rate",
    "wall_s": "Simulation time / s",
}


def render(report: Mapping[str, Any], drawings: Sequence[Drawing], axes: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        drawings: Figures in reading order.
        axes: ``curves["axes"]``, for the units of the observables.

    Returns:
        An HTML document. All text from outside is escaped, and its content policy forbids scripts and loading.
    """
    told = wording.evaluations(report)
    return Template(PAGE).substitute(
        light="".join(f"--{colour.name}: {colour.light}; " for colour in PALETTE),
        dark="".join(f"--{colour.name}: {colour.dark}; " for colour in PALETTE),
        title=escape(str(report["title"])),
        outcome=wording.outcome(report),
        headline=escape(wording.headline(report)),
        findings="".join(f"<li>{escape(line)}</li>" for line in wording.findings(report, axes)),
        tiles=_tiles(told),
        figures="".join(_figure(drawing) for drawing in drawings),
        numbers=_numbers(report, axes),
        rounds=_rounds(report.get("windows") or []),
        settings=_settings(report.get("settings") or {}),
        definitions=_definitions(report),
        footer="".join(f"<p>{escape(line)}</p>" for line in _footer(report) if line),
    )


def _tiles(told: Mapping[str, Evaluation]) -> str:
    compared = {stage: told[stage] for stage in ("before", "after", "evaluation") if stage in told}
    last = list(compared.values())[-1]
    horizon = wording.number(last["horizon_ps"])

    def change(value: Callable[[Evaluation], str]) -> str:
        parts = [f'<span class="{stage}">{escape(value(e))}</span>' for stage, e in compared.items()]
        return '<span class="to" aria-label="to"> → </span>'.join(parts)

    def each(value: Callable[[Evaluation], str]) -> str:
        lines = (f"{'' if stage == 'evaluation' else stage + ': '}{value(e)}" for stage, e in told.items())
        return "<br>".join(escape(line) for line in lines)

    def tile(label: str, value: str, unit: str, note: str) -> str:
        return (
            f'<div class="tile"><h3>{label}</h3><p class="value">{value} <small>{unit}</small></p><p>{note}</p></div>'
        )

    same_number = len({e["replicas"] for e in compared.values()}) == 1
    count = change(lambda e: f"{e['unstable']}" if same_number else f"{e['unstable']}/{e['replicas']}")
    tiles = [
        tile(
            f"Failed within {horizon} ps",
            count,
            f"of {last['replicas']} replicas" if same_number else "replicas",
            each(lambda e: f"{100 * e['unstable'] / e['replicas']:.0f} %"),
        ),
        tile("Failures per ns", change(_short_rate), "", each(_rate_interval)),
        tile(
            "Median stable time",
            change(_short_median),
            "ps",
            "until half of the replicas failed"
            + (f"<br>control: {escape(wording.median(told['control']))}" if "control" in told else ""),
        ),
    ]
    if any(e.get("force_mae_mev_per_A") is not None for e in compared.values()):
        note = "mean absolute error"
        if "before" in told:
            note += f"<br>{escape(wording.force_change(told['before'], told['after']))}"
        forces = change(lambda e: wording.number(e.get("force_mae_mev_per_A")))
        tiles.append(tile("Force error, held out", forces, "meV/Å", note))
    return "".join(tiles)


def _short_median(evaluation: Evaluation) -> str:
    if evaluation.get("median_stable_ps") is None:
        return f"> {wording.number(evaluation['horizon_ps'])}"
    return wording.number(evaluation["median_stable_ps"])


def _short_rate(evaluation: Evaluation) -> str:
    if evaluation["unstable"] == 0:
        return f"≤ {wording.number(evaluation['failures_per_ns_interval'][1])}"
    return wording.number(evaluation["failures_per_ns"])


def _rate_interval(evaluation: Evaluation) -> str:
    if evaluation["unstable"] == 0:
        return wording.rate(evaluation)
    low, high = evaluation["failures_per_ns_interval"]
    return f"{wording.number(low)} – {wording.number(high)} (95 %)"


def _figure(drawing: Drawing) -> str:
    svg = inline_svg(drawing.figure, drawing.name, f"{drawing.title}. {drawing.caption}")
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>"
    return f'<figure><h2>{escape(drawing.title)}</h2><div class="plot">{svg}</div>{caption}</figure>'


def _numbers(report: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """The table of all evaluated numbers, one column a stage."""
    told, longer = wording.evaluations(report), wording.evaluations(report, "extended")
    stages = list(told)

    def row(label: str, part: Mapping[str, Evaluation], value: Callable[[Evaluation], str]) -> str:
        cells = "".join(f"<td>{escape(value(part[s]) if s in part else '–')}</td>" for s in stages)
        return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'

    def group(label: str, rows: list[str]) -> str:
        return (
            f'<tbody><tr class="group"><th colspan="{len(stages) + 1}">{escape(label)}</th></tr>{"".join(rows)}</tbody>'
        )

    def stability(part: Mapping[str, Evaluation]) -> list[str]:
        return [
            row(
                "Replicas failed", part, lambda e: f"{wording.failed(e)} ({100 * e['unstable'] / e['replicas']:.0f} %)"
            ),
            row("Median stable time", part, wording.median),
            row("Failure rate", part, wording.rate),
            *(
                [row("Atoms that broke", part, wording.broken)]
                if any(e.get("broken_atoms") for e in part.values())
                else []
            ),
        ]

    def observable(part: Mapping[str, Evaluation], name: str) -> str:
        unit = wording.unit(axes.get(name) or {})
        label = f"{wording.observable(name)}, MAE" + (f" / {unit}" if unit else "")
        return row(label, part, lambda e: wording.deviation(e, name))

    def error(label: str, key: str) -> str:
        return row(label, told, lambda e: wording.number(e.get(key)))

    def observables(part: Mapping[str, Evaluation]) -> list[str]:
        names = dict.fromkeys(name for e in part.values() for name in e.get("observables") or {})
        return [observable(part, name) for name in names]

    within = f"Simulations of {wording.number(next(iter(told.values()))['horizon_ps'])} ps"
    groups = [group(within, stability(told) + observables(told))]
    if longer:
        followed = wording.number(next(iter(longer.values()))["horizon_ps"])
        groups.append(group(f"The same replicas followed to {followed} ps", stability(longer) + observables(longer)))
    errors = {"force_mae_mev_per_A": "Force MAE / meV/Å", "energy_mae_mev_per_atom": "Energy MAE / meV per atom"}
    known = [key for key in errors if any(e.get(key) is not None for e in told.values())]
    if known:
        groups.append(group("Held-out frames", [error(errors[key], key) for key in known]))
    heads = "".join(f'<th scope="col" class="{s}">{escape(STAGES[s].label)}</th>' for s in stages)
    return f'<div class="wide"><table class="numbers"><thead><tr><th></th>{heads}</tr></thead>{"".join(groups)}</table></div>'


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    if not rounds:
        return ""
    head = "".join(f'<th scope="col">{label}</th>' for label in _ROUND_COLUMNS.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_round_cell(key, entry.get(key)))}</td>" for key in _ROUND_COLUMNS) + "</tr>"
        for entry in rounds
    )
    table = (
        f'<div class="wide"><table class="windows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return f"<details><summary>All windows ({len(rounds)})</summary>{table}</details>"


def _round_cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key in ("unstable_fraction", "ess_fraction") and value is not None:
        return f"{100 * value:.0f} %"
    return wording.number(value, 4)


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    return f'<details><summary>Settings</summary><div class="wide">{_nested(settings)}</div></details>'


def _nested(value: Any) -> str:
    """A value as HTML: a mapping as a table, whose cells may hold tables."""
    if isinstance(value, Mapping) and value:
        rows = "".join(f'<tr><th scope="row">{escape(str(k))}</th><td>{_nested(v)}</td></tr>' for k, v in value.items())
        return f'<table class="settings">{rows}</table>'
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return _nested({f"{i + 1}": item for i, item in enumerate(value)})
    if isinstance(value, list) and len(value) > _LONGEST_LIST:
        return f"{_nested(value[:_LONGEST_LIST])}, … ({len(value)} values)"
    if isinstance(value, list):
        return ", ".join(_nested(item) for item in value) or "[]"
    return escape(value if isinstance(value, str) else json.dumps(value))


def _footer(report: Mapping[str, Any]) -> list[str]:
    return [
        wording.cost(report),
        ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items()),
        "All numbers and curves are in report.json and curves.json beside this page, the figures in the folder figures.",
    ]


def _definitions(report: Mapping[str, Any]) -> str:
    told = wording.evaluations(report)
    entry = next(iter(told.values()))
    detector = str(entry["detector"])
    if "(" not in detector:
        detector += f" with a threshold of {wording.number(entry['threshold'])}"
    items = {
        "Replica": "One simulation with its own initial velocities and noise, from a start frame that is held out: no "
        "potential was trained on it.",
        "Failed": f"The detector, {detector}, flagged the replica at some time up to the end of the count "
        f"({wording.number(entry['horizon_ps'])} ps).",
        "Median stable time": "Time at which the Kaplan-Meier curve first falls to one half. Replicas that did not fail "
        "count until the end of their run.",
        "Failure rate": "Failures divided by the summed time at risk, that is until failure or the end of the run. Interval: "
        "exact 95 % interval of a Poisson count (Garwood). One rate takes the hazard as constant in time.",
        "Force and energy MAE": "Mean absolute error on held-out frames with known forces and energies: over all force "
        "components, and for energies per atom.",
        "MAE of an observable": "Distance between mean and reference, averaged over bonds or bins. The mean "
        "is over the frames of all replicas, of each up to its failure: a model whose replicas fail early is judged by "
        "fewer frames, and not by what follows a failure. ±: standard error of the mean, averaged likewise, from the "
        "spread between replicas and between stretches of one picosecond.",
    }
    if "before" in told:
        items["Fewer, more, no clear difference"] = (
            f"Two-sided Fisher's exact test on the counts of failed replicas, at p = {wording.SIGNIFICANCE:g}, taking "
            "replicas as independent. It covers the simulations, not the choice of training seed."
        )
    if "control" in told:
        items["Control"] = (
            "The model before, trained on with energies and forces alone for as many optimizer steps at the same "
            "learning rates."
        )
    if report.get("windows"):
        items["WindowData size left"] = (
            "Effective share of the frames after reweighting them to the updated potential; 100 % means as if sampled from it."
        )
    return "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in items.items())
