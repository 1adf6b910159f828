"""What every picture shares: canvas, palette, and labels that can't break it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Colours that stay apart for the colour-blind; the first seven by Okabe and Ito 2008."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
LONGEST = 24


def new_figure(width: float, height: float, title: str) -> Figure:
    """Open a figure (inches) that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title, 90), fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; a letter that the font lacks becomes a box, not a warning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=DPI)


def plain(text: str, longest: int = LONGEST) -> str:
    """Make a name fit for a label: shortened, no formula, and no underscore that hides it."""
    flat = " ".join(text.split())
    short = flat if len(flat) <= longest else flat[: longest - 1] + "…"
    guarded = short.replace("$", r"\$")
    return f" {guarded}" if guarded.startswith("_") else guarded


def style(number: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th row: no two of the first eight share a colour."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }
