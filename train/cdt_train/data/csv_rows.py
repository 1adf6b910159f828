"""Rows of a CSV: each fault is one line that names the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cdt_runtime.errors import DatasetError
from cdt_train.data.dataset import GroupedBy
from cdt_train.data.regions import region_tile

BY_TILE = (
    "{source} names no patients: folds are made by tile, tiles of one patient may stand on both "
    "sides, and results must not be called patient-level"
)

Check = Callable[[list[str]], str | None]
"""Given the column names, what is wrong with them, or None."""


@dataclass(frozen=True)
class Row:
    """One line of the file; `where` opens every message about it."""

    where: str
    cells: Mapping[str, str]

    @property
    def line(self) -> str:
        """The number of the line."""
        return self.where.rsplit(" ", 1)[1]

    def cell(self, column: str) -> str:
        """What stands in a column.

        Raises:
            DatasetError: nothing.
        """
        value = self.cells[column]
        if not value:
            raise DatasetError(f"{self.where}: {column} is empty")
        return value


def read_rows(
    csv_path: Path, check: Check, also_called: Mapping[str, str] | None = None
) -> list[Row]:
    """Reads every line that is not blank.

    Args:
        csv_path: UTF-8, with or without a byte order mark, cells parted by commas.
        check: judges the columns.
        also_called: other name of a column -> its name here.

    Raises:
        DatasetError: the file can't be read, is no such CSV, or has no lines.
    """
    rows: list[Row] = []
    try:
        # utf-8-sig drops the byte order mark that spreadsheets write
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = _columns(csv_path, next(reader, []), check, also_called or {})
            for cells in reader:
                where = f"{csv_path} line {reader.line_num}"
                if any(cell.strip() for cell in cells):
                    rows.append(_row(where, columns, cells))
    except OSError as error:
        raise DatasetError(f"{csv_path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{csv_path} is not UTF-8 (byte {error.start}): save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        raise DatasetError(f"{csv_path} line {reader.line_num}: {error}") from error
    if not rows:
        raise DatasetError(f"{csv_path}: no line follows the header")
    return rows


def missing_column(columns: Iterable[str], needed: Iterable[str], expected: str) -> str | None:
    """What is wrong with columns that lack one, or None."""
    columns = list(columns)
    absent = [name for name in needed if name not in columns]
    if not absent:
        return None
    return f"column '{absent[0]}' is missing from '{','.join(columns)}'; expected {expected}"


def grouped_by(row: Row) -> GroupedBy:
    """What the lines of a file name the groups by."""
    if "patient" in row.cells:
        return "patient"
    return "group" if "group" in row.cells else "tile"


def inside(row: Row, root: Path, value: str) -> Path:
    """`root / value`; refused where that would leave `root`."""
    part = PurePosixPath(value.replace("\\", "/"))
    if part.is_absolute() or Path(value).is_absolute() or ".." in part.parts:
        raise DatasetError(f"{row.where}: '{value}' leads out of {root}")
    return root / part


def existing_tile(row: Row, path: Path) -> Path:
    """The tile at a path: a file, or a region folder.

    Raises:
        DatasetError: there is nothing, or a folder without images.
    """
    try:
        if not path.exists():
            raise DatasetError(f"{row.where}: {path} does not exist")
        return region_tile(path, f"{row.where}: ") if path.is_dir() else path
    except OSError as error:  # no permission, a name that is too long
        raise DatasetError(f"{row.where}: {error.strerror}: {error.filename}") from error


class Seen:
    """The tiles that earlier lines named."""

    def __init__(self) -> None:
        self._first: dict[Path, tuple[Row, str]] = {}

    def add(self, row: Row, path: Path, label: str) -> None:
        """Take note of a tile.

        Raises:
            DatasetError: an earlier line named it.
        """
        first_row, first_label = self._first.setdefault(path.resolve(), (row, label))
        if first_row is row:
            return
        if label != first_label:
            raise DatasetError(
                f"{row.where}: label '{label}', but line {first_row.line} gave the same tile "
                f"'{first_label}'"
            )
        raise DatasetError(f"{row.where}: the tile stands on line {first_row.line} already")


def _row(where: str, columns: list[str], cells: list[str]) -> Row:
    if len(cells) != len(columns):
        raise DatasetError(
            f"{where}: {len(cells)} cells, the header has {len(columns)} columns "
            "(a cell with a comma needs quotes)"
        )
    stripped = [cell.strip() for cell in cells]
    if not all(cell.isprintable() for cell in stripped):
        raise DatasetError(f"{where}: a cell has a line break or another control character")
    return Row(where, dict(zip(columns, stripped, strict=True)))


def _columns(
    csv_path: Path, header: list[str], check: Check, also_called: Mapping[str, str]
) -> list[str]:
    where = f"{csv_path} line 1"
    written = [name.strip().lower() for name in header]
    if len(written) == 1 and ";" in written[0]:
        raise DatasetError(f"{where}: columns are parted by ';', expected ','")
    columns = [also_called.get(name, name) for name in written]
    for index, name in enumerate(columns):
        first = columns.index(name)
        if first != index and written[first] == written[index]:
            raise DatasetError(f"{where}: column '{name}' stands there twice")
        if first != index:
            raise DatasetError(
                f"{where}: columns '{written[first]}' and '{written[index]}' mean the same: keep "
                "one"
            )
    wrong = check(columns)
    if wrong:
        raise DatasetError(f"{where}: {wrong}")
    return columns
