"""Figures of a report: survival, observables against their reference, and the training windows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from stable_plugin.evaluation import wording
from stable_plugin.evaluation.figure_style import (
    INK,
    MUTED,
    PAPER,
    REFERENCE,
    RULE,
    STAGES,
    legend_above,
    new_figure,
    truncate,
)
from stable_plugin.evaluation.formatting import number

_MAX_LABELED_BARS = 80
"""Bars are labeled one by one up to this number."""

_MAX_MARKERS = 100
"""Windows are drawn with markers up to this number; beyond it, the shading alone shows the phases."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its heading and caption.

    Attributes:
        name: File name without extension, unique in the report.
        figure: The figure.
        title: Heading.
        caption: Text below the figure.
    """

    name: str
    figure: Figure
    title: str
    caption: str


def draw(report: Mapping[str, Any], curves: Mapping[str, Any]) -> list[Drawing]:
    """Draw all figures for which there are data, in the order of the page.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        curves: See :func:`stable_plugin.evaluation.report.write_report`.

    Returns:
        Survival, one figure per observable, and the windows.

    Raises:
        ValueError: If the values of an observable and its axis differ in length.
    """
    shown = {key: curves[key] for key in STAGES if curves.get(key)}
    drawings = []
    if any(stage.get("survival") for stage in shown.values()):
        drawings.append(_survival(report, shown))
    names = list(dict.fromkeys(name for stage in shown.values() for name in stage.get("observables") or {}))
    for index, name in enumerate(names, start=1):
        axis = (curves.get("axes") or {}).get(name) or {}
        drawings.append(_observable(f"observable_{index}_{_slug(name)}", name, axis, report, shown))
    if report.get("windows"):
        drawings.append(_windows(report["windows"]))
    return drawings


def _survival(report: Mapping[str, Any], shown: Mapping[str, Any]) -> Drawing:
    figure = new_figure(3.6)
    axes = figure.subplots()
    evaluations = wording.evaluations(report)
    end = max(stage["survival"]["time_ps"][-1] for stage in shown.values() if stage.get("survival"))
    axes.axhline(0.5, color=RULE.light, linewidth=0.8, zorder=0)
    for key, stage in shown.items():
        if not stage.get("survival"):
            continue
        time, fraction, low, high = (
            _floats(stage["survival"][part]) for part in ("time_ps", "probability", "low", "high")
        )
        style = STAGES[key]
        label = style.label
        if key in evaluations:
            label += f": {wording.failed(evaluations[key])} failed"
        axes.fill_between(time, low, high, step="post", color=style.color.light, alpha=0.16, linewidth=0)
        if fraction[-1] == 0.0:
            # All replicas have failed, so the curve stays at zero; a censored curve ends with its data.
            time, fraction = np.append(time, end), np.append(fraction, 0.0)
        line: dict[str, Any] = {"color": style.color.light, "linestyle": style.dashes, "linewidth": 1.8}
        axes.step(time, fraction, where="post", label=label, **line)
    horizon = max((e["horizon_ps"] for e in evaluations.values()), default=end)
    if end > 1.01 * horizon:
        label = f"failures are counted up to {number(horizon)} ps"
        axes.axvline(horizon, color=MUTED.light, linewidth=1.0, linestyle=":", label=label)
    axes.set(xlim=(0.0, end or 1.0), ylim=(0.0, 1.03), xlabel="time / ps", ylabel="stable replicas / %")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    legend_above(axes)
    return Drawing(
        "survival",
        figure,
        "Stability of the replicas",
        "Fraction of replicas that have not failed yet (Kaplan-Meier estimate). Shaded: pointwise 95 % confidence "
        "interval. Each step down is a failure; the curve crosses the horizontal line at the median stable time.",
    )


def _observable(
    slug: str, name: str, axis: Mapping[str, Any], report: Mapping[str, Any], shown: Mapping[str, Any]
) -> Drawing:
    data = {key: stage["observables"][name] for key, stage in shown.items() if name in (stage.get("observables") or {})}
    means = {key: _floats(values["mean"]) for key, values in data.items()}
    errors = {
        key: _floats(values.get("standard_error") or [math.nan] * len(means[key])) for key, values in data.items()
    }
    target = _floats(next(iter(data.values()))["target"])
    x = list(axis.get("x") or range(len(target)))
    for key, mean in means.items():
        if not len(mean) == len(target) == len(x):
            raise ValueError(
                f"curves[{key!r}]['observables'][{name!r}] has {len(mean)} means for {len(target)} targets and {len(x)} "
                f"positions in curves['axes'][{name!r}]['x']: pass the same number of each."
            )
    labels = {key: _label_with_error(report, key, name) for key in means}
    xlabel, ylabel = truncate(str(axis.get("xlabel", "value"))), truncate(str(axis.get("ylabel", name)))
    deviation_label = "difference" + (f" / {truncate(wording.unit(axis))}" if wording.unit(axis) else "")
    if axis.get("kind") == "curve":
        figure = _curve_figure(_floats(x), target, means, errors, labels, (xlabel, ylabel, deviation_label))
        caption = (
            "Gray: reference. Top: mean over the simulated frames of each model, each replica up to its failure. Bottom: "
            "difference from the reference; a rise next to a dip is a shifted peak, a dip between two rises a broadened "
            "one. Shaded: ± 2 standard errors."
        )
    else:
        names = [truncate(str(label), 16) for label in x]
        figure = _bar_figure(names, target, means, errors, labels, (xlabel, deviation_label))
        for_each = f", for each {xlabel}" if xlabel else ""
        caption = (
            f"Mean over the simulated frames of each model, each replica up to its failure, minus the reference{for_each}. Error "
            "bars: ± 2 standard errors."
        )
    return Drawing(slug, figure, wording.observable_name(name), caption)


def _curve_figure(
    x: NDArray[np.float64],
    target: NDArray[np.float64],
    means: Mapping[str, NDArray[np.float64]],
    errors: Mapping[str, NDArray[np.float64]],
    labels: Mapping[str, str],
    axis_labels: tuple[str, str, str],
) -> Figure:
    figure = new_figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.0, 1.0))
    upper.fill_between(x, target, color=REFERENCE.light, alpha=0.4, linewidth=0, label="reference")
    lower.axhline(0.0, color=REFERENCE.light, linewidth=1.0)
    for key, mean in means.items():
        color = STAGES[key].color.light
        line: dict[str, Any] = {"color": color, "linestyle": STAGES[key].dashes, "linewidth": 1.2}
        upper.plot(x, mean, label=labels[key], **line)
        lower.plot(x, mean - target, **line)
        low, high = mean - target - 2.0 * errors[key], mean - target + 2.0 * errors[key]
        lower.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    upper.set(xlim=_occupied(x, [target, *means.values()]), ylabel=axis_labels[1])
    upper.set_ylim(bottom=0.0 if all(np.nanmin(v, initial=0.0) >= 0.0 for v in (target, *means.values())) else None)
    lower.set(xlabel=axis_labels[0], ylabel=axis_labels[2])
    legend_above(upper)
    figure.align_ylabels([upper, lower])
    return figure


def _bar_figure(
    names: Sequence[str],
    target: NDArray[np.float64],
    means: Mapping[str, NDArray[np.float64]],
    errors: Mapping[str, NDArray[np.float64]],
    labels: Mapping[str, str],
    axis_labels: tuple[str, str],
) -> Figure:
    figure = new_figure(3.7)
    axes = figure.subplots()
    position = np.arange(len(names))
    axes.axhline(0.0, color=REFERENCE.light, linewidth=1.0)
    for place, (key, mean) in enumerate(means.items()):
        color = STAGES[key].color.light
        shifted = position + 0.24 * (place - (len(means) - 1) / 2.0)
        axes.vlines(shifted, 0.0, mean - target, color=color, linewidth=1.6, alpha=0.55)
        axes.errorbar(shifted, mean - target, 2.0 * errors[key], fmt="none", ecolor=color, elinewidth=0.7, capsize=1.5)
        axes.plot(
            shifted,
            mean - target,
            STAGES[key].marker,
            color=color,
            markersize=4.2,
            markeredgewidth=0.0,
            label=labels[key],
        )
    for boundary in position[:-1] + 0.5 if len(names) <= _MAX_LABELED_BARS else []:
        axes.axvline(boundary, color=RULE.light, linewidth=0.5, zorder=0)
    if len(names) <= _MAX_LABELED_BARS:
        axes.set_xticks(position, names, rotation=90 if len(names) > 8 else 0, fontsize=8 if len(names) <= 45 else 6)
        axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.6, len(names) - 0.4), xlabel=axis_labels[0], ylabel=axis_labels[1])
    legend_above(axes)
    return figure


def _windows(windows: Sequence[Mapping[str, Any]]) -> Drawing:
    numbers = [entry["window"] for entry in windows]
    ascending = all(a < b for a, b in pairwise(numbers))
    x = _floats(numbers) if ascending else np.arange(1.0, len(windows) + 1.0)
    learning = np.array([entry["phase"] == "learn" for entry in windows])
    loss = _floats([entry.get("observable_loss") for entry in windows])
    known = np.isfinite(loss)

    figure = new_figure(4.2 if known.any() else 2.6)
    panels: list[Axes] = figure.subplots(2 if known.any() else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for panel in panels:
        for first, last in _runs(learning):
            panel.axvspan(x[first] - 0.5, x[last] + 0.5, color=RULE.light, alpha=0.7, linewidth=0, zorder=0)
    _unstable(panels[0], x, windows, learning)
    panels[0].set(ylim=(-0.04, 1.04), ylabel="unstable replicas / %")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if known.any():
        _trace(panels[1], x[known], loss[known], learning[known])
        panels[1].set_ylabel("observable loss")
        if loss[known].min() > 0.0 and loss[known].max() > 5.0 * loss[known].min():
            panels[1].set_yscale("log")
            if loss[known].max() < 100.0 * loss[known].min():
                panels[1].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panels[1].yaxis.set_minor_formatter(NullFormatter())
    panels[-1].set(xlabel="window", xlim=(x[0] - 0.6, x[-1] + 0.6))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels(panels)
    handles = [*panels[0].get_lines()[1:], Patch(color=RULE.light, alpha=0.7, linewidth=0, label="learning phase")]
    legend_above(panels[0], handles)
    return Drawing(
        "windows",
        figure,
        "StABlE training",
        "Top: fraction of replicas that the training detector flagged as unstable in the window. The line joins probes, "
        "which all start from the same states, with exact 95 % intervals; other windows start where earlier ones "
        "succeeded or are hotter, and are no measure of progress. Bottom: loss of the observables in windows at the "
        "temperature of their targets. The threshold in "
        "training is usually tighter than in the evaluation, so these fractions differ from the failures counted there.",
    )


def _unstable(
    axes: Axes, x: NDArray[np.float64], windows: Sequence[Mapping[str, Any]], learning: NDArray[np.bool_]
) -> None:
    """Draw the unstable fractions: a line with intervals through the probes, small markers for the other windows."""
    y = _floats([entry["unstable_fraction"] for entry in windows])
    probes = np.array([entry["phase"] == "probe" for entry in windows])
    low = _floats([entry.get("unstable_low") for entry in windows])
    high = _floats([entry.get("unstable_high") for entry in windows])
    lines = (
        (probes, "-o", 4.5, PAPER.light, "probe"),
        (learning, "o", 2.5, INK.light, "learning window"),
        (~probes & ~learning, "s", 3.0, PAPER.light, "verification window"),
    )
    # The figure's legend leaves out the first line of each panel.
    axes.plot([], [])
    for chosen, style, size, fill, label in lines:
        if chosen.any():
            axes.plot(
                x[chosen], y[chosen], style, color=INK.light, linewidth=1.0, markersize=size, markerfacecolor=fill,
                markeredgecolor=INK.light, markeredgewidth=1.0, label=label,
            )  # fmt: skip
    axes.vlines(x[probes], low[probes], high[probes], color=INK.light, linewidth=0.7)


def _trace(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], learning: NDArray[np.bool_]) -> None:
    """Draw a line through all windows, with filled markers for learning windows."""
    crowded = len(x) > _MAX_MARKERS
    axes.plot(x, y, color=INK.light, linewidth=0.7 if crowded else 1.0)
    if crowded:
        return
    for chosen, fill, label in (
        (learning, INK.light, "learning window"),
        (~learning, PAPER.light, "probe or verification window"),
    ):
        if chosen.any():
            axes.plot(
                x[chosen], y[chosen], "o", markersize=4.5, markerfacecolor=fill, markeredgecolor=INK.light,
                markeredgewidth=1.0, label=label,
            )  # fmt: skip


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first and last index of each consecutive run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(int)))
    return [(int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2)]


def _label_with_error(report: Mapping[str, Any], key: str, name: str) -> str:
    """Return the label of a stage with the mean absolute error of an observable."""
    error = (wording.evaluations(report).get(key) or {}).get("observables", {}).get(name)
    return STAGES[key].label + ("" if error is None else f", MAE {number(error)}")


def _occupied(x: NDArray[np.float64], series: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the range of x in which any of the series is visibly above zero, with a margin."""
    size = np.nanmax(np.abs(np.stack(series)), axis=0)
    visible = np.flatnonzero(size > 2e-3 * np.nanmax(size, initial=0.0))
    first, last = (visible[0], visible[-1]) if len(visible) else (0, len(x) - 1)
    margin = 0.02 * (x[last] - x[first]) or 0.5
    return float(x[first] - margin), float(x[last] + margin)


def _floats(values: Any) -> NDArray[np.float64]:
    """Return numbers as an array; None becomes NaN, which Matplotlib does not draw."""
    return np.asarray(values, dtype=np.float64)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]
