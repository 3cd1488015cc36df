"""One look for all figures, and their two forms: a small PNG, and an SVG that takes its colours from the page."""

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
class Colour:
    """A colour on a light and on a dark page.

    Attributes:
        name: CSS variable without its dashes.
        light: Hex value on light pages and in PNGs; no two colours share one.
        dark: Hex value on dark pages.
    """

    name: str
    light: str
    dark: str


# Vermilion, blue and purple as Okabe and Ito chose them for colour-blind readers; the purple is darkened so that a
# thin line still shows on white. Line styles and markers differ as well.
BEFORE = Colour("before", "#d55e00", "#ff8f45")
CONTROL = Colour("control", "#a8517f", "#e394c4")
AFTER = Colour("after", "#0072b2", "#5fb4ee")
REFERENCE = Colour("reference", "#8b949d", "#7f8994")
INK = Colour("ink", "#1c2127", "#e8ecf0")
MUTED = Colour("muted", "#59626c", "#a2acb7")
RULE = Colour("rule", "#dde1e6", "#333a43")
PAPER = Colour("paper", "#fefefe", "#1a1e24")
PALETTE = (BEFORE, CONTROL, AFTER, REFERENCE, INK, MUTED, RULE, PAPER)


@dataclass(frozen=True)
class Stage:
    """How one evaluated model is named and drawn.

    Attributes:
        label: Name in legends and tables.
        colour: Of lines, bands and markers.
        dashes: Matplotlib line style.
        marker: Matplotlib marker.
    """

    label: str
    colour: Colour
    dashes: str
    marker: str


STAGES = {
    "before": Stage("before", BEFORE, "-", "o"),
    "control": Stage("control", CONTROL, "--", "s"),
    "after": Stage("after", AFTER, "-", "D"),
    "evaluation": Stage("this model", AFTER, "-", "D"),
}
"""Evaluated models by their key in a report, in the order in which they are told and drawn."""


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of this package, for figures made and saved inside the block."""
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
        # Names come from users: a dollar sign in one is no formula.
        "text.parse_math": False,
        "svg.fonttype": "none",
    }
    with mpl.rc_context(style):
        yield


def new_figure(height_in: float) -> Figure:
    """An empty figure of the common width, tied to no window and no global state."""
    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def legend_above(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """A legend over the axes, where it covers no data, in as few rows as the width allows."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    # Half an inch for handle and gap, and 0.07 inch for a letter of 9 points.
    entries_in = [0.5 + 0.07 * len(str(handle.get_label())) for handle in handles]
    rows = math.ceil(sum(entries_in) / (WIDTH_IN - 0.8))
    columns = max(1, math.ceil(len(handles) / max(rows, 1)))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=columns)


def short(text: str, longest: int = 40) -> str:
    """A text cut to what a figure has room for."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as PNG on white, in few enough colours to be a small file."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page that defines the colours of ``PALETTE`` as CSS variables.

    Args:
        figure: What to draw.
        name: Unique in the page and made of letters, digits and underscores; ids start with it.
        description: What a screen reader says.

    Returns:
        ``<svg ...>...</svg>`` that loads nothing.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Inside HTML the namespaces are implied, and the size is the page's to choose.
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'style="[^"]*"', _with_variables, svg)
    label = escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def _with_variables(style: re.Match[str]) -> str:
    text = style.group()
    for colour in PALETTE:
        text = text.replace(colour.light, f"var(--{colour.name})")
    return text
