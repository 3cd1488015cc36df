"""The figures of a report: survival, observables against their reference, and the course of the rounds."""

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
from stable_plugin.evaluation.canvas import (
    INK,
    MUTED,
    PAPER,
    REFERENCE,
    RULE,
    STAGES,
    legend_above,
    new_figure,
    short,
)

_MOST_LABELS = 80
"""More bars than this go without a name each."""

_MOST_MARKERS = 100
"""More windows than this are a line alone; shading still tells the phases."""


@dataclass(frozen=True)
class Drawing:
    """A figure and the words around it.

    Attributes:
        name: File name without its ending, unique in the report.
        figure: The figure.
        title: Heading.
        caption: What is shown and how to read it.
    """

    name: str
    figure: Figure
    title: str
    caption: str


def draw(report: Mapping[str, Any], curves: Mapping[str, Any]) -> list[Drawing]:
    """All figures that the data allow, in reading order.

    Args:
        report: See :func:`stable_plugin.evaluation.report.write_report`.
        curves: See there.

    Returns:
        Survival, one drawing for each observable, the rounds.

    Raises:
        ValueError: If the values of an observable and its axis differ in length.
    """
    shown = {key: curves[key] for key in STAGES if curves.get(key)}
    drawings = []
    if any(stage.get("survival") for stage in shown.values()):
        drawings.append(_survival(report, shown))
    names = list(dict.fromkeys(name for stage in shown.values() for name in stage.get("observables") or {}))
    for number, name in enumerate(names, start=1):
        axis = (curves.get("axes") or {}).get(name) or {}
        drawings.append(_observable(f"observable_{number}_{_slug(name)}", name, axis, report, shown))
    if report.get("windows"):
        drawings.append(_rounds(report["windows"]))
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
        time, share, low, high = (
            _floats(stage["survival"][part]) for part in ("time_ps", "probability", "low", "high")
        )
        look = STAGES[key]
        label = look.label
        if key in evaluations:
            label += f": {wording.failed(evaluations[key])} failed"
        axes.fill_between(time, low, high, step="post", color=look.colour.light, alpha=0.16, linewidth=0)
        if share[-1] == 0.0:
            # Nobody is left, so the curve stays at zero; a censored one ends where its data end.
            time, share = np.append(time, end), np.append(share, 0.0)
        axes.step(time, share, where="post", color=look.colour.light, linestyle=look.dashes, linewidth=1.8, label=label)
    horizon = max((e["horizon_ps"] for e in evaluations.values()), default=end)
    if end > 1.01 * horizon:
        label = f"failures counted to here, {wording.number(horizon)} ps"
        axes.axvline(horizon, color=MUTED.light, linewidth=1.0, linestyle=":", label=label)
    axes.set(xlim=(0.0, end or 1.0), ylim=(0.0, 1.03), xlabel="time / ps", ylabel="replicas still stable / %")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    legend_above(axes)
    return Drawing(
        "survival",
        figure,
        "How long replicas stay stable",
        "Share of replicas that have not yet crossed the detector's threshold (Kaplan-Meier estimate). Shaded: pointwise "
        "95 % confidence interval. Each step down is a failure; the horizontal line at 50 % gives the median stable time.",
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
                f"positions in curves['axes'][{name!r}]['x']: give as many of each."
            )
    labels = {key: _label_with_error(report, key, name) for key in means}
    xlabel, ylabel = short(str(axis.get("xlabel", "value"))), short(str(axis.get("ylabel", name)))
    deviation_label = "difference" + (f" / {short(wording.unit(axis))}" if wording.unit(axis) else "")
    if axis.get("kind") == "curve":
        figure = _curve_figure(_floats(x), target, means, errors, labels, (xlabel, ylabel, deviation_label))
        caption = (
            "Grey: reference. Above, the mean over simulated frames with each model, up to the failure of a replica; below, "
            "the difference from the reference: a rise beside a dip is a peak that has moved, a dip between two rises a "
            "peak that has broadened. Shaded: twice the standard error to either side."
        )
    else:
        names = [short(str(label), 16) for label in x]
        figure = _bar_figure(names, target, means, errors, labels, (xlabel, deviation_label))
        caption = (
            f"Mean over simulated frames with each model, up to the failure of a replica, minus the reference, for each "
            f"{xlabel}. Zero is the reference. Thin lines: twice the standard error to either side."
        )
    return Drawing(slug, figure, wording.observable(name), caption)


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
        look = STAGES[key]
        style: dict[str, Any] = {"color": look.colour.light, "linestyle": look.dashes, "linewidth": 1.2}
        upper.plot(x, mean, label=labels[key], **style)
        lower.plot(x, mean - target, **style)
        low, high = mean - target - 2.0 * errors[key], mean - target + 2.0 * errors[key]
        lower.fill_between(x, low, high, color=look.colour.light, alpha=0.16, linewidth=0)
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
        look = STAGES[key]
        shifted = position + 0.24 * (place - (len(means) - 1) / 2.0)
        axes.vlines(shifted, 0.0, mean - target, color=look.colour.light, linewidth=1.6, alpha=0.55)
        axes.errorbar(
            shifted, mean - target, 2.0 * errors[key], fmt="none", ecolor=look.colour.light, elinewidth=0.7, capsize=1.5
        )
        axes.plot(
            shifted,
            mean - target,
            look.marker,
            color=look.colour.light,
            markersize=4.2,
            markeredgewidth=0.0,
            label=labels[key],
        )
    for boundary in position[:-1] + 0.5 if len(names) <= _MOST_LABELS else []:
        axes.axvline(boundary, color=RULE.light, linewidth=0.5, zorder=0)
    if len(names) <= _MOST_LABELS:
        axes.set_xticks(position, names, rotation=90 if len(names) > 8 else 0, fontsize=8 if len(names) <= 45 else 6)
        axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.6, len(names) - 0.4), xlabel=axis_labels[0], ylabel=axis_labels[1])
    legend_above(axes)
    return figure


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Drawing:
    numbers = [entry["window"] for entry in rounds]
    ascending = all(a < b for a, b in pairwise(numbers))
    x = _floats(numbers) if ascending else np.arange(1.0, len(rounds) + 1.0)
    learning = np.array([entry["phase"] == "learn" for entry in rounds])
    share = _floats([entry["unstable_fraction"] for entry in rounds])
    loss = _floats([entry.get("observable_loss") for entry in rounds])
    known = np.isfinite(loss)

    figure = new_figure(4.2 if known.any() else 2.6)
    panels: list[Axes] = figure.subplots(2 if known.any() else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for panel in panels:
        for first, last in _runs(learning):
            panel.axvspan(x[first] - 0.5, x[last] + 0.5, color=RULE.light, alpha=0.7, linewidth=0, zorder=0)
    _trace(panels[0], x, share, learning)
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
        "How training went",
        "Above: share of replicas that the training detector called unstable, in the window itself when learning and "
        "since the phase began when simulating. Below: loss of the observables against their reference in that window. "
        "The training threshold is usually tighter than the one of the evaluation, so these shares are not the counts "
        "at the top of the page.",
    )


def _trace(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], learning: NDArray[np.bool_]) -> None:
    """A line through all windows, its markers filled where the model learnt."""
    crowded = len(x) > _MOST_MARKERS
    axes.plot(x, y, color=INK.light, linewidth=0.7 if crowded else 1.0)
    if crowded:
        return
    for chosen, fill, label in (
        (learning, INK.light, "learning window"),
        (~learning, PAPER.light, "simulation window"),
    ):
        if chosen.any():
            axes.plot(
                x[chosen], y[chosen], "o", markersize=4.5, markerfacecolor=fill, markeredgecolor=INK.light,
                markeredgewidth=1.0, label=label,
            )  # fmt: skip


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of each unbroken run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(int)))
    return [(int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2)]


def _label_with_error(report: Mapping[str, Any], key: str, name: str) -> str:
    """The stage, and the mean absolute error of its mean."""
    error = (wording.evaluations(report).get(key) or {}).get("observables", {}).get(name)
    return STAGES[key].label + ("" if error is None else f", MAE {wording.number(error)}")


def _occupied(x: NDArray[np.float64], series: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """The range of x in which any of the series is visibly above zero, with a margin."""
    size = np.nanmax(np.abs(np.stack(series)), axis=0)
    seen = np.flatnonzero(size > 2e-3 * np.nanmax(size, initial=0.0))
    first, last = (seen[0], seen[-1]) if len(seen) else (0, len(x) - 1)
    margin = 0.02 * (x[last] - x[first]) or 0.5
    return float(x[first] - margin), float(x[last] + margin)


def _floats(values: Any) -> NDArray[np.float64]:
    """Numbers as an array; null becomes NaN, which Matplotlib leaves out."""
    return np.asarray(values, dtype=np.float64)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]
