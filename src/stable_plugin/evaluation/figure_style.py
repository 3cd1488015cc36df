"""Common style of all figures, and their output as small PNG files and as SVG with the colors of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH_IN = 8.6
_DPI = 110


@dataclass(frozen=True)
class Color:
    """A color on light and on dark pages.

    Attributes:
        name: CSS variable without its dashes.
        light: Hex value on light pages and in PNG files, unique among the colors.
        dark: Hex value on dark pages.
    """

    name: str
    light: str
    dark: str


# Vermilion, blue and purple of the Okabe-Ito palette for color-blind readers; the purple is darkened so that thin
# lines are visible on white. Line styles and markers differ as well.
BEFORE = Color("before", "#d55e00", "#ff8f45")
CONTROL = Color("control", "#a8517f", "#e394c4")
AFTER = Color("after", "#0072b2", "#5fb4ee")
REFERENCE = Color("reference", "#8b949d", "#7f8994")
INK = Color("ink", "#1c2127", "#e8ecf0")
MUTED = Color("muted", "#59626c", "#a2acb7")
RULE = Color("rule", "#dde1e6", "#333a43")
PAPER = Color("paper", "#fefefe", "#1a1e24")
PALETTE = (BEFORE, CONTROL, AFTER, REFERENCE, INK, MUTED, RULE, PAPER)


@dataclass(frozen=True)
class Stage:
    """Label and line style of one evaluated model.

    Attributes:
        label: Name in legends and tables.
        color: Color of lines, bands and markers.
        dashes: Matplotlib line style.
        marker: Matplotlib marker.
    """

    label: str
    color: Color
    dashes: str
    marker: str


STAGES = {
    "before": Stage("before", BEFORE, "-", "o"),
    "control": Stage("control", CONTROL, "--", "s"),
    "after": Stage("after", AFTER, "-", "D"),
    "evaluation": Stage("this model", AFTER, "-", "D"),
}
"""Evaluated models by their key in a report, in the order of tables and figures."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Apply the Matplotlib settings of this package to figures created and saved in the block."""
    style: dict[Any, Any] = {
        "figure.facecolor": PAPER.light,
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED.light,
        "axes.labelcolor": MUTED.light,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "xtick.color": MUTED.light,
        "ytick.color": MUTED.light,
        "text.color": INK.light,
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "lines.solid_capstyle": "butt",
        # Labels come from users, and a dollar sign in them does not start a formula.
        "text.parse_math": False,
        "svg.fonttype": "none",
    }
    with mpl.rc_context(style):
        yield


def new_figure(height_in: float) -> Figure:
    """Return an empty figure of the common width, independent of pyplot's global state."""
    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def legend_above(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Add a legend above the axes, where it covers no data, in as few rows as the width allows."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    # Half an inch for handle and gap, and 0.07 inch per letter of 9 points.
    entries_in = [0.5 + 0.07 * len(str(handle.get_label())) for handle in handles]
    rows = math.ceil(sum(entries_in) / (WIDTH_IN - 0.8))
    columns = max(1, math.ceil(len(handles) / max(rows, 1)))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=columns)


def truncate(text: str, max_length: int = 40) -> str:
    """Shorten a text to the room in a figure."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def png(figure: Figure) -> bytes:
    """Return the figure as PNG on white, with few colors to keep the file small."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an SVG element for a page that defines the colors of ``PALETTE`` as CSS variables.

    Args:
        figure: Figure to draw.
        name: Prefix of all ids, unique in the page; letters, digits and underscores only.
        description: Text for screen readers.

    Returns:
        ``<svg ...>...</svg>`` that loads nothing from elsewhere.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # HTML implies the namespaces, and the page sets the size.
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'style="[^"]*"', _with_variables, svg)
    label = escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def _with_variables(style: re.Match[str]) -> str:
    text = style.group()
    for color in PALETTE:
        text = text.replace(color.light, f"var(--{color.name})")
    return text
