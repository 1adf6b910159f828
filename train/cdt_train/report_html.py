"""The report of a run as one HTML file that needs nothing else: no script, no network, no fonts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cdt_runtime.files import write_synced
from cdt_train.report_style import STYLE

COLUMNS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auc_roc": "AUC-ROC",
    "cohen_kappa": "kappa",
    "mcc": "MCC",
    "ece": "ECE",
    "brier": "Brier",
    "nll": "NLL",
    "aurc": "AURC",
    "accuracy_at_80": "accuracy at 80 % coverage",
}
"""Metrics by the titles of their columns; one that no row has is left out."""

NOTICE = "Research use only: not a medical device. Nothing here may be used to diagnose or treat."
NO_INTERVAL = "–"

Spread = Mapping[str, float]
"""`mean`, `std`, `ci95` and `n`, as `intervals.over_folds` gives them."""


class Control(TypedDict):
    """One comparison of two rows on the same episodes.

    Attributes:
        title: such as "with CT against without CT".
        mean: difference in accuracy, first less second.
        ci95: half-width of its interval.
        verdict: in words.
    """

    title: str
    mean: float
    ci95: float
    verdict: str


class Calibration(TypedDict):
    """How probabilities were calibrated for one K, mean over folds."""

    temperature: float
    ece_before: float
    ece_after: float


class Report(TypedDict):
    """What a report shows; `metrics.json` holds it, with more.

    Attributes:
        data: the data set in words.
        phantom: whether the data is generated.
        grouped_by: what keeps the folds apart, such as "patient".
        classes: their names.
        warnings: what the reader of the data had to say.
        paired: whether tiles and CT are of the same patients.
        seed: of the run.
        episodes: number of episodes a fold and K.
        rows: titles by key, in order.
        over_folds: row, K (as text), metric -> `Spread`.
        config: the recipe.
        verdict: the line that everything comes down to.
        effect: comparisons of rows: with CT, without, wrong patient's CT.
        calibration: by K (as text).
        groups: row, K -> `low`, `high` and `groups` of `intervals.bootstrap_groups`.
        facts: further lines, name and value, such as the device or the hours.
    """

    data: str
    phantom: bool
    grouped_by: str
    classes: Sequence[str]
    warnings: Sequence[str]
    paired: bool
    seed: int
    episodes: int
    rows: Mapping[str, str]
    over_folds: Mapping[str, Mapping[str, Mapping[str, Spread]]]
    config: Mapping[str, Any]
    verdict: NotRequired[str]
    effect: NotRequired[Sequence[Control]]
    calibration: NotRequired[Mapping[str, Calibration]]
    groups: NotRequired[Mapping[str, Mapping[str, Spread]]]
    facts: NotRequired[Mapping[str, str]]


def write_report(path: Path, report: Report, pictures: Mapping[str, Path]) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        report: what it says.
        pictures: PNG files by caption; they are embedded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, render(report, pictures).encode())


def render(report: Report, pictures: Mapping[str, Path]) -> str:
    """Return the whole page; every text of the report is escaped."""
    title = "CDT Edge: report of a training run"
    body = [
        f"<header><h1>{title}</h1><p class=notice>{escape(NOTICE)}</p></header>",
        _verdict(report),
        _section("Data", _data(report)),
        _section("Results", *(_table(report, k) for k in _shots(report))),
        _section("Does the CT help?", _controls(report)),
        _section("Calibration", _calibration(report)),
        _section("Pictures", *(_picture(caption, png) for caption, png in pictures.items())),
        _section("Recipe", _recipe(report["config"])),
        f"<footer><p class=notice>{escape(NOTICE)}</p></footer>",
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    """A section, or nothing where all of its parts are empty."""
    shown = [part for part in parts if part]
    if not shown:
        return ""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(shown) + "</section>"


def _verdict(report: Report) -> str:
    lines = [report["verdict"]] if report.get("verdict") else []
    if report["phantom"]:
        lines.append(
            "Phantom data: these figures say that the pipeline learns, and nothing of patients."
        )
    return "".join(f"<p class=verdict>{escape(line)}</p>" for line in lines)


def _data(report: Report) -> str:
    pairs = {
        "data": report["data"],
        "classes": ", ".join(report["classes"]),
        "folds": f"by {report['grouped_by']}: none is on two sides of a fold",
        "CT and tiles": "of the same patients" if report["paired"] else "of different patients",
        "seed": str(report["seed"]),
        **report.get("facts", {}),
    }
    rows = "".join(f"<dt>{escape(name)}<dd>{escape(text)}" for name, text in pairs.items())
    noted = "".join(f"<li>{escape(line)}" for line in report["warnings"])
    return f"<dl>{rows}</dl>" + (f"<h3>Warnings</h3><ul class=warn>{noted}</ul>" if noted else "")


def _shots(report: Report) -> list[str]:
    found = {k for cells in report["over_folds"].values() for k in cells}
    return sorted(found, key=int)


def _table(report: Report, k: str) -> str:
    """Table of one K: a line a row, a column a metric."""
    rows = {row: cells[k] for row, cells in report["over_folds"].items() if k in cells}
    names = [name for name in COLUMNS if any(name in cells for cells in rows.values())]
    folds = max((int(s.get("n", 0)) for cells in rows.values() for s in cells.values()), default=0)
    titles = [COLUMNS[name] for name in names]
    groups = {row: cells[k] for row, cells in report.get("groups", {}).items() if k in cells}
    if groups:
        titles.insert(1, f"accuracy, 95 % over {report['grouped_by']}s")
    lines = []
    for row, cells in rows.items():
        parts = [_cell(cells.get(name), folds) for name in names]
        if groups:
            parts.insert(1, _range(groups.get(row)))
        lines.append((report["rows"].get(row, row), parts))
    caption = (
        f"{len(report['classes'])}-way {k}-shot, {report['episodes']} episodes a fold: "
        f"mean over {folds} folds {_meaning(folds)}"
    )
    return _grid(caption, titles, lines)


def _grid(caption: str, titles: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table: titles are text, each line its name as text and its cells as HTML."""
    head = "".join(f"<th scope=col>{escape(title)}" for title in titles)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells)
        for name, cells in lines
    )
    return (
        f"<div class=wide><table><caption>{escape(caption)}</caption>"
        f"<thead><tr><td>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _meaning(folds: int) -> str:
    """What stands behind the mean in a table of so many folds."""
    if folds < 2:
        return "(one fold: no interval)"
    if folds == 2:
        return "± sd; the 95 % interval of two folds, 9 sd to either side, is in brackets"
    return "± 95 % t-interval over folds"


def _cell(spread: Spread | None, folds: int) -> str:
    if spread is None:
        return NO_INTERVAL
    mean = f"{spread['mean']:.3f}"
    if folds < 2:
        return mean
    if folds == 2:
        return f"{mean} <small>± {spread['std']:.3f} (± {spread['ci95']:.2f})</small>"
    return f"{mean} <small>± {spread['ci95']:.3f}</small>"


def _range(spread: Spread | None) -> str:
    if spread is None:
        return NO_INTERVAL
    return f"{spread['low']:.3f} to {spread['high']:.3f} <small>({int(spread['groups'])})</small>"


def _controls(report: Report) -> str:
    lines = []
    for control in report.get("effect", ()):
        points = f"{100 * control['mean']:+.1f} <small>± {100 * control['ci95']:.1f}</small>"
        lines.append((control["title"], [points, escape(control["verdict"])]))
    titles = ["points of accuracy, ± 95 % over groups", "verdict"]
    return _grid("Differences on the same episodes", titles, lines) if lines else ""


def _calibration(report: Report) -> str:
    found = report.get("calibration", {})
    lines = [
        (f"K = {k}", [f"{cell['temperature']:.2f}", *_errors(cell)])
        for k, cell in sorted(found.items(), key=lambda item: int(item[0]))
    ]
    titles = ["temperature", "ECE before", "ECE after, out of sample"]
    caption = "One temperature for each K, fitted on validation tiles; mean over folds"
    return _grid(caption, titles, lines) if lines else ""


def _errors(cell: Calibration) -> list[str]:
    return [f"{cell['ece_before']:.3f}", f"{cell['ece_after']:.3f}"]


def _picture(caption: str, png: Path) -> str:
    data = base64.b64encode(png.read_bytes()).decode()
    shown = escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{shown}">'
        f"<figcaption>{shown}</figcaption></figure>"
    )


def _recipe(config: Mapping[str, Any]) -> str:
    lines = [f"{key} = {value}" for key, value in _flat(config)]
    text = escape("\n".join(lines))
    return f"<details><summary>{len(lines)} keys</summary><pre>{text}</pre></details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
