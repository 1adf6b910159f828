"""Charts of a run, as PNG: training, decisions, calibration, comparison of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_train.canvas import new_figure, plain, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, float]]
Curve = Mapping[str, Sequence[float]]


def plot_curves(
    path: Path,
    title: str,
    history: History,
    panels: Mapping[str, str],
    best_epoch: int | None = None,
) -> None:
    """Draw training curves over epochs and save them as PNG.

    Args:
        path: the PNG file.
        title: of the whole picture.
        history: one entry an epoch.
        panels: for each key of the history the panel (axis label) that it belongs to.
        best_epoch: the epoch whose weights were kept; marked where it is given.
    """
    names = list(dict.fromkeys(panels.values()))
    figure = new_figure(5 * len(names), 3.8, title)
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), position)
        keys = [key for key, panel in panels.items() if panel == name]
        _draw_history(axes, history, keys)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.45", linestyle=":", label="best epoch")
        axes.set_ylabel(name)
        if "accuracy" in name:
            axes.set_ylim(0, 1.02)
        if axes.lines:
            axes.legend(fontsize=8)
    save(figure, path)


def plot_confusion(
    path: Path, title: str, confusion: NDArray[np.int64], classes: Sequence[str]
) -> None:
    """Draw a confusion matrix: colour by share of the true class, text by share and count.

    Args:
        path: the PNG file.
        title: of the picture.
        confusion: `(K, K)` counts, true class by row.
        classes: K names.
    """
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    ways = len(classes)
    side = max(4.2, 1.6 + 0.95 * ways)
    figure = new_figure(side + 1.2, side, title)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{100 * share:.0f} %\n{confusion[row, column]}"
        colour = "white" if share > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    names = [plain(name) for name in classes]
    tilted: dict[str, Any] = {} if max(map(len, names)) <= 8 else {"rotation": 35, "ha": "right"}
    axes.set_xticks(range(ways), names, **tilted, rotation_mode="anchor")
    axes.set_yticks(range(ways), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    save(figure, path)


def plot_roc(path: Path, title: str, roc: Sequence[Curve], classes: Sequence[str]) -> None:
    """Draw the ROC curve of each class against the rest.

    Args:
        path: the PNG file.
        title: of the picture.
        roc: for each class what `metrics.roc_curve` gives.
        classes: names in the same order.
    """
    figure = new_figure(5.4, 5, title)
    axes = figure.add_subplot(aspect="equal")
    for number, (curve, name) in enumerate(zip(roc, classes, strict=True)):
        area = np.trapezoid(curve["true_positive"], curve["false_positive"])
        look = {**style(number), "marker": ""}
        label = f"{plain(name)}: AUC {area:.3f}"
        axes.plot(curve["false_positive"], curve["true_positive"], label=label, **look)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="chance")
    _unit_square(axes, "false positive rate", "true positive rate")
    axes.legend(loc="lower right", fontsize=8)
    save(figure, path)


def plot_reliability(path: Path, title: str, rows: Mapping[str, Curve]) -> None:
    """Draw confidence against accuracy, and below it how many queries each bin holds.

    Args:
        path: the PNG file.
        title: of the picture.
        rows: by name what `metrics.reliability` gives, such as before and after calibration.
    """
    figure = new_figure(5.4, 6.2, title)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="as right as it says")
    for number, (name, bins) in enumerate(rows.items()):
        counts = np.asarray(bins["count"], dtype=np.float64)
        look = style(number)
        upper.plot(bins["confidence"], bins["accuracy"], label=plain(name), markersize=5, **look)
        shares = 100 * counts / max(counts.sum(), 1)
        lower.plot(bins["confidence"], shares, markersize=4, **look)
    upper.set(xlim=(0, 1.02), ylim=(0, 1.02), ylabel="accuracy")
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="queries in %")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(loc="upper left", fontsize=8)
    save(figure, path)


def plot_risk_coverage(path: Path, title: str, rows: Mapping[str, Curve]) -> None:
    """Draw the share of errors against the share of queries that are answered.

    Args:
        path: the PNG file.
        title: of the picture.
        rows: by name the `risk_coverage` of `metrics.curves`.
    """
    figure = new_figure(5.8, 4, title)
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(rows.items()):
        look = {**style(number), "marker": ""}
        percent = [100 * np.asarray(curve[key]) for key in ("coverage", "risk")]
        axes.plot(*percent, label=plain(name), **look)
    axes.axvline(80, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="coverage: answered queries in %, the surest first", ylabel="errors in %")
    axes.set_xlim(0, 102)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def plot_accuracy_by_k(
    path: Path,
    title: str,
    rows: Mapping[str, Mapping[int, Mapping[str, float]]],
    *,
    chance: float,
    interval: str = "ci95",
) -> None:
    """Draw accuracy against the number of support tiles a class, all rows, with intervals.

    Args:
        path: the PNG file.
        title: of the picture.
        rows: by name, then K, what `intervals.over_folds` gives.
        chance: accuracy of guessing.
        interval: key of the half-width to draw, "ci95" or "std".
    """
    figure = new_figure(7.6, 4.4, title)
    axes = figure.add_subplot()
    shots = sorted({k for cells in rows.values() for k in cells})
    for number, (name, cells) in enumerate(rows.items()):
        at = [shots.index(k) + 0.06 * (number - (len(rows) - 1) / 2) for k in sorted(cells)]
        means = [100 * cells[k]["mean"] for k in sorted(cells)]
        halves = [100 * cells[k][interval] for k in sorted(cells)]
        axes.errorbar(at, means, halves, capsize=3, label=plain(name, 32), **style(number))
    axes.axhline(100 * chance, color="0.6", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    axes.set_xlim(-0.5, len(shots) - 0.5)
    axes.set_ylim(0, 102)
    what = {"ci95": "95 % interval over folds", "std": "sd over folds"}[interval]
    axes.set(xlabel="support tiles a class (K)", ylabel=f"accuracy in %, ± {what}")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, path)


def _draw_history(axes: Axes, history: History, keys: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, key in enumerate(keys):
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        if points:
            look: dict[str, Any] = style(number)
            label = key.replace("_", " ")
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **look)
    if history:
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _unit_square(axes: Axes, across: str, up: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
