"""A finished run as files: report.json, curves.json, PNG figures, and one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.canvas import house_style, png
from stable_plugin.evaluation.figures import draw
from stable_plugin.evaluation.page import render
from stable_plugin.runtime.atomic_files import atomic_write, explain_write_errors


def write_report(run_dir: Path, report: Mapping[str, Any], curves: Mapping[str, Any]) -> Path:
    """Write ``report.json``, ``curves.json``, ``figures/*.png`` and ``report.html`` into a folder.

    The two JSON files are written first, so that no number is lost if a figure cannot be drawn. Numbers that are not
    finite become null.

    Args:
        run_dir: Folder of the run; made if it does not exist.
        report: ``title``, and either ``before``, ``after`` and perhaps ``control``, or ``evaluation`` alone, as
            :class:`~stable_plugin.evaluation.Evaluation` summarises them. If known, ``extended`` with the same stages
            at a longer horizon, ``settings``, ``rounds``, ``wall_s``, ``md_steps``, ``optimizer_steps``, ``versions``.
        curves: For each stage ``survival`` (see :meth:`SurvivalCurve.as_dict`) and ``observables`` (``mean`` and
            ``target`` by name), and ``axes`` (``kind``, ``x``, ``xlabel``, ``ylabel`` by name).

    Returns:
        Path of ``report.html``.

    Raises:
        FileExistsError: If the folder holds a report already; nothing is overwritten.
        ValueError: If there is neither ``evaluation`` nor both ``before`` and ``after``, or a curve and its axis
            differ in length.
        OSError: If the folder cannot be written to; names the path and the way out.
    """
    run_dir = Path(run_dir)
    figure_dir, page = run_dir / "figures", run_dir / "report.html"
    for path in (run_dir / "report.json", run_dir / "curves.json", page, figure_dir):
        if path.exists():
            raise FileExistsError(
                f"{path} exists and is not overwritten: give a new run_dir, or move the old one away."
            )
    report, curves = _plain(report), _plain(curves)
    _check_stages(report)
    with explain_write_errors(page, "report"):
        run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "report.json", _json(report))
    _write(run_dir / "curves.json", _json(curves))
    with house_style():
        drawings = draw(report, curves)
        with explain_write_errors(page, "report"):
            figure_dir.mkdir()
        for drawing in drawings:
            _write(figure_dir / f"{drawing.name}.png", png(drawing.figure))
        _write(page, render(report, drawings, curves.get("axes") or {}).encode())
    return page


def summary(report: Mapping[str, Any]) -> str:
    """The few lines that a run prints at its end.

    Args:
        report: See :func:`write_report`.

    Returns:
        Lines without a newline at the end.

    Raises:
        ValueError: If there is neither ``evaluation`` nor both ``before`` and ``after``.
    """
    _check_stages(report)
    told = wording.evaluations(report)
    if "before" not in told:
        only = told["evaluation"]
        lines = [wording.alone(only), _accuracy([only])]
    else:
        before, after = told["before"], told["after"]
        horizon = wording.number(before["horizon_ps"])
        counts = [f"Before: {wording.failed(before)} replicas failed within {horizon} ps{_median(before)}."]
        if "control" in told:
            counts.append(f"Control: {wording.failed(told['control'])}{_median(told['control'])}.")
        counts.append(f"After: {wording.failed(after)}{_median(after)}.")
        lines = [" ".join(counts)]
        if wording.outcome(report) != "better":
            lines.append(wording.headline(report))
        lines.append(_accuracy([before, after]))
    longer = wording.evaluations(report, "extended")
    if longer:
        horizon = wording.number(next(iter(longer.values()))["horizon_ps"])
        counts = [
            wording.failed(e) if stage == "evaluation" else f"{stage} {wording.failed(e)}"
            for stage, e in longer.items()
        ]
        lines.append(f"Failed when followed to {horizon} ps: {', '.join(counts)}.")
    return "\n".join(line for line in [*lines, wording.cost(report)] if line)


def _median(evaluation: Mapping[str, Any]) -> str:
    time = evaluation.get("median_stable_ps")
    return "" if time is None else f" (median stable time {wording.number(time)} ps)"


def _accuracy(told: list[Mapping[str, Any]]) -> str:
    """The errors on labeled frames; empty if there were none."""
    units = {"force_mae_mev_per_A": ("Force MAE", "meV/Å"), "energy_mae_mev_per_atom": ("energy MAE", "meV/atom")}
    parts = [
        f"{name} {' -> '.join(wording.number(e.get(key)) for e in told)} {unit}"
        for key, (name, unit) in units.items()
        if any(e.get(key) is not None for e in told)
    ]
    return f"{', '.join(parts)} (held out)." if parts else ""


def _check_stages(report: Mapping[str, Any]) -> None:
    told = wording.evaluations(report)
    if "evaluation" not in told and not {"before", "after"} <= set(told):
        raise ValueError(
            f"report has the evaluations {list(told)}: give 'before' and 'after' (and 'control' if there is one), or "
            "'evaluation' alone."
        )


def _plain(value: Any) -> Any:
    """A copy made of JSON's types alone; what JSON cannot say becomes null (not finite) or its text (objects)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole."""
    with atomic_write(path, "report") as partial:
        partial.write_bytes(content)
