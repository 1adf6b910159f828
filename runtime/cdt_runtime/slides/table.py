"""What is known of each tile of a slide, in memory and as a CSV file that grows as tiles come."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import InputError
from cdt_runtime.files import write_synced
from cdt_runtime.slides.grid import Grid

Float = NDArray[np.float32]
Row = tuple[int, int]

COLUMNS = ("row", "column", "x", "y", "width", "height", "tissue", "label", "reason")
LOW, BLANK = "low confidence", "no tissue"


@dataclass(frozen=True)
class TileAnswer:
    """What is said of one tile.

    Attributes:
        row: of the grid.
        column: of the grid.
        tissue: share of the tile that is tissue.
        label: the class, or None where there is no answer.
        reason: why there is none.
        chances: probability of each class; empty where the tile could not be read.
    """

    row: int
    column: int
    tissue: float
    label: str | None
    reason: str | None
    chances: tuple[float, ...]


class TileTable:
    """The growing file: one line a tile, each written whole before the next batch.

    Args:
        path: of the file; what it holds already is taken up by `resumed`.
        grid: of the slide.
        classes: names, in the order of the probabilities.
    """

    def __init__(self, path: Path, grid: Grid, classes: Sequence[str]) -> None:
        self._path, self._grid, self._classes = path, grid, tuple(classes)

    @property
    def _header(self) -> list[str]:
        return [*COLUMNS, *(f"p_{name}" for name in self._classes)]

    def begin(self) -> None:
        """Start an empty table."""
        write_synced(self._path, _lines([self._header]).encode())

    def append(self, answers: Sequence[TileAnswer]) -> None:
        """Add tiles at the end."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines(self._cells(one) for one in answers))

    def resumed(self) -> list[TileAnswer]:
        """Return the tiles of an interrupted run; a last line that was cut short is dropped.

        Raises:
            InputError: the file is none of ours.
        """
        text = self._path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_synced(self._path, whole.encode())
        rows = list(csv.reader(io.StringIO(whole)))
        if not rows or rows[0] != self._header:
            raise InputError(
                f"{self._path.name} in the output folder has other columns: give another --out"
            )
        return [self._answer(cells) for cells in rows[1:]]

    def finish(self, answers: Sequence[TileAnswer], path: Path) -> None:
        """Write the table sorted by row and column, and drop the growing file."""
        ordered = sorted(answers, key=lambda one: (one.row, one.column))
        rows = [self._header, *(self._cells(one) for one in ordered)]
        write_synced(self._path, _lines(rows).encode())
        self._path.replace(path)

    def _cells(self, one: TileAnswer) -> list[str]:
        side = self._grid.full_side
        place = (one.column * side, one.row * side, side, side)
        return [
            str(one.row),
            str(one.column),
            *(f"{value:.1f}" for value in place),
            f"{one.tissue:.3f}",
            one.label or "",
            one.reason or "",
            *(f"{chance:.4f}" for chance in one.chances or [float("nan")] * len(self._classes)),
        ]

    def _answer(self, cells: list[str]) -> TileAnswer:
        chances = tuple(map(float, cells[len(COLUMNS) :]))
        known = () if np.isnan(chances).any() else chances
        label, reason = cells[7] or None, cells[8] or None
        return TileAnswer(int(cells[0]), int(cells[1]), float(cells[6]), label, reason, known)


def as_map(answers: Sequence[TileAnswer], grid: Grid, classes: int) -> Float:
    """Lay the probabilities out as the tiles lie.

    Returns:
        `(K, rows, columns)` float32; NaN where there is no tissue or no answer.
    """
    laid = np.full((classes, grid.rows, grid.columns), np.nan, np.float32)
    for one in answers:
        if one.label is not None:
            laid[:, one.row, one.column] = one.chances
    return laid


def as_labels(
    answers: Sequence[TileAnswer], grid: Grid, classes: Sequence[str]
) -> NDArray[np.int16]:
    """Lay the classes out as the tiles lie: `(rows, columns)`, -1 without tissue or answer."""
    index = {name: at for at, name in enumerate(classes)}
    laid = np.full((grid.rows, grid.columns), -1, np.int16)
    for one in answers:
        if one.label is not None:
            laid[one.row, one.column] = index[one.label]
    return laid


def as_reasons(
    answers: Sequence[TileAnswer], grid: Grid
) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """Lay out why tiles that could be read got no answer.

    Returns:
        `(rows, columns)` index of the reason, -1 elsewhere; and the reasons.
    """
    open_ = [one for one in answers if one.reason and one.chances]
    reasons = tuple(sorted({str(one.reason) for one in open_}))
    laid = np.full((grid.rows, grid.columns), -1, np.int16)
    for one in open_:
        laid[one.row, one.column] = reasons.index(str(one.reason))
    return laid, reasons


def _lines(rows: Sequence[list[str]] | Iterator[list[str]] | object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # type: ignore[arg-type]
    return text.getvalue()
