"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

History = Sequence[Mapping[str, float]]


def plot_curves(path: Path, title: str, history: History, panels: Mapping[str, str]) -> None:
    """Draw training curves over epochs and save them as PNG.

    Args:
        path: the PNG file.
        title: of the whole picture.
        history: one entry an epoch.
        panels: for each key of the history the panel (axis label) that it belongs to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(panels.values()))
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), position)
        for key in (key for key, panel in panels.items() if panel == name):
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=key.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        if "accuracy" in name:
            axes.set_ylim(0, 1.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
