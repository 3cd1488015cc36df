"""Report of a run as files: report.json, curves.json, PNG figures and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.figure_style import figure_style, png
from stable_plugin.evaluation.figures import draw
from stable_plugin.evaluation.formatting import number, plain
from stable_plugin.evaluation.page import render
from stable_plugin.evaluation.report_warnings import report_warnings
from stable_plugin.runtime.atomic_files import atomic_write, explain_write_errors


def write_report(run_dir: Path, report: Mapping[str, Any], curves: Mapping[str, Any]) -> Path:
    """Write ``report.json``, ``curves.json``, ``figures/*.png`` and ``report.html`` into a folder.

    The page and ``report.json`` begin with the verdict on the last stage. The two JSON files are written first, so that no number is lost if a figure cannot be drawn. Numbers that are not
    finite become null.

    Args:
        run_dir: Folder of the run; created if it does not exist.
        report: ``title``, and either ``before``, ``after`` and optionally ``control``, or ``evaluation`` alone, each a
            summary of :class:`~stable_plugin.evaluation.Evaluation`. Optional: ``extended`` with the same stages at a
            longer horizon, ``settings``, ``windows``, ``wall_s``, ``md_steps``, ``optimizer_steps``, ``versions``. Of several
            systems, see :mod:`stable_plugin.evaluation.system_reports`: ``system``, ``systems``, ``total``,
            ``not_evaluated``, ``failed_systems``, ``all_systems``.
        curves: For each stage ``survival`` (see :meth:`SurvivalCurve.as_dict`) and ``observables`` (``mean`` and
            ``target`` by name), and ``axes`` (``kind``, ``x``, ``xlabel``, ``ylabel`` by name).

    Returns:
        Path of ``report.html``.

    Raises:
        FileExistsError: If the folder already holds a report; nothing is overwritten.
        ValueError: If there is neither ``evaluation`` nor both ``before`` and ``after``, or a curve and its axis
            differ in length.
        OSError: If the folder cannot be written to; the message names the path and the remedy.
    """
    run_dir = Path(run_dir)
    figure_dir, page = run_dir / "figures", run_dir / "report.html"
    for path in (run_dir / "report.json", run_dir / "curves.json", page, figure_dir):
        if path.exists():
            raise FileExistsError(
                f"{path} already exists and is not overwritten: set another run_dir, or move the existing report away."
            )
    report, curves = plain(report), plain(curves)
    _check_stages(report)
    if verdict := wording.stability(report):
        report = {"verdict": verdict, **report}
    with explain_write_errors(page, "report"):
        run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "report.json", _json(report))
    _write(run_dir / "curves.json", _json(curves))
    with figure_style():
        drawings = draw(report, curves)
        with explain_write_errors(page, "report"):
            figure_dir.mkdir()
        for drawing in drawings:
            _write(figure_dir / f"{drawing.name}.png", png(drawing.figure))
        _write(page, render(report, drawings, curves.get("axes") or {}).encode())
    return page


def summary(report: Mapping[str, Any]) -> str:
    """Return the lines that a run prints at its end: failures, errors, cost, and warnings last.

    Args:
        report: See :func:`write_report`.

    Returns:
        Lines without a newline at the end.

    Raises:
        ValueError: If there is neither ``evaluation`` nor both ``before`` and ``after``.
    """
    _check_stages(report)
    stages = wording.evaluations(report)
    systems = report.get("systems") or {}
    lines = [f"{name}: {_counts(wording.evaluations(each))}" for name, each in systems.items()] or [_counts(stages)]
    if "before" in stages and wording.outcome(report) != "better":
        lines.append(wording.headline(report))
    lines.append(_label_errors([stage for name, stage in stages.items() if name != "control"]))
    lines.insert(0, wording.stability(report))
    lines += [_extended_counts(wording.evaluations(report, "extended")), wording.cost(report)]
    lines += [f"Warning: {line}" for line in report_warnings(report)]
    return "\n".join(line for line in lines if line)


def _counts(stages: Mapping[str, wording.EvaluationSummary]) -> str:
    return _failure_counts(stages) if "before" in stages else wording.single_evaluation(stages["evaluation"])


def _failure_counts(stages: Mapping[str, wording.EvaluationSummary]) -> str:
    horizon = number(stages["before"]["horizon_ps"])
    counts = []
    for stage, evaluation in stages.items():
        within = f" replicas failed within {horizon} ps" if stage == "before" else ""
        counts.append(f"{stage.capitalize()}: {wording.failed(evaluation)}{within}{_median(evaluation)}.")
    return " ".join(counts)


def _median(evaluation: wording.EvaluationSummary) -> str:
    time = evaluation.get("median_stable_ps")
    return "" if time is None else f" (median stable time {number(time)} ps)"


def _label_errors(evaluations: Sequence[wording.EvaluationSummary]) -> str:
    """Return the errors on labeled frames, or an empty text if there are none."""
    units = {
        "force_mae_mev_per_A": ("Force MAE", "meV/Å"),
        "energy_mae_mev_per_atom": ("energy MAE", "meV/atom"),
        "energy_mae_fitted_zero_mev_per_atom": ("with the zero of energy fitted per element", "meV/atom"),
    }
    parts = [
        f"{name} {' -> '.join(number(evaluation.get(key)) for evaluation in evaluations)} {unit}"
        for key, (name, unit) in units.items()
        if all(evaluation.get(key) is not None for evaluation in evaluations)
    ]
    return f"{', '.join(parts)} (held out)." if parts else ""


def _extended_counts(extended: Mapping[str, wording.EvaluationSummary]) -> str:
    """Return the failures up to the longer horizon, or an empty text if there is none."""
    if not extended:
        return ""
    horizon = number(next(iter(extended.values()))["horizon_ps"])
    counts = [
        wording.failed(evaluation) if stage == "evaluation" else f"{stage} {wording.failed(evaluation)}"
        for stage, evaluation in extended.items()
    ]
    return f"Failed within {horizon} ps: {', '.join(counts)}."


def _check_stages(report: Mapping[str, Any]) -> None:
    stages = wording.evaluations(report)
    if "evaluation" not in stages and not {"before", "after"} <= set(stages):
        raise ValueError(
            f"report has the stages {list(stages)}: pass 'before' and 'after' (and optionally 'control'), or "
            "'evaluation' alone."
        )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    with atomic_write(path, "report") as partial:
        partial.write_bytes(content)
