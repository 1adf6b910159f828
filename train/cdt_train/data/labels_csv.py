"""Labels from a CSV: each fault is one line that names the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cdt_runtime.errors import DatasetError
from cdt_train.data.dataset import GroupedBy, LabelledTile
from cdt_train.data.regions import region_files, region_tile

HEADERS = "'patient,region,label' or 'path,label' (with 'patient' or 'group' if known)"

BY_TILE = (
    "{source} names no patients: folds are made by tile, tiles of one patient may stand on both "
    "sides, and results must not be called patient-level"
)


@dataclass(frozen=True)
class _Row:
    """One line of the file; `where` opens every message about it."""

    where: str
    cells: dict[str, str]

    def cell(self, column: str) -> str:
        value = self.cells[column]
        if not value:
            raise DatasetError(f"{self.where}: {column} is empty")
        return value


def read_labels_csv(
    csv_path: Path, pathology: Path
) -> tuple[list[LabelledTile], GroupedBy, list[str]]:
    """Reads the tiles that a label file names, in its order.

    Args:
        csv_path: UTF-8, with or without a byte order mark, cells parted by commas.
        pathology: The folder in which PATIENT/REGION of `patient,region,label` are looked up.

    Returns:
        The tiles, what their `patient` holds, and warnings.

    Raises:
        DatasetError: a column is missing; or a line has an empty cell, names a tile that does not
            exist, lies outside the folder, or was named before.
    """
    rows = list(_rows(csv_path))
    if not rows:
        raise DatasetError(f"{csv_path}: no line follows the header")
    grouped_by = _grouped_by(rows[0])
    root = csv_path.parent if "path" in rows[0].cells else pathology
    tiles = []
    first_seen: dict[Path, tuple[_Row, str]] = {}
    for row in rows:
        path = _tile_path(row, root)
        label = row.cell("label")
        _refuse_repeated(row, label, first_seen.setdefault(path.resolve(), (row, label)))
        group = path.relative_to(root).as_posix() if grouped_by == "tile" else row.cell(grouped_by)
        tiles.append(LabelledTile(path, label, group))
    return tiles, grouped_by, [BY_TILE.format(source=csv_path)] if grouped_by == "tile" else []


def _rows(csv_path: Path) -> Iterator[_Row]:
    try:
        # utf-8-sig drops the byte order mark that spreadsheets write
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = _columns(csv_path, next(reader, []))
            for cells in reader:
                where = f"{csv_path} line {reader.line_num}"
                if any(cell.strip() for cell in cells):
                    yield _row(where, columns, cells)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{csv_path} is not UTF-8 (byte {error.start}): save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        raise DatasetError(f"{csv_path} line {reader.line_num}: {error}") from error


def _row(where: str, columns: list[str], cells: list[str]) -> _Row:
    if len(cells) != len(columns):
        raise DatasetError(
            f"{where}: {len(cells)} cells, the header has {len(columns)} columns "
            "(a cell with a comma needs quotes)"
        )
    stripped = [cell.strip() for cell in cells]
    if not all(cell.isprintable() for cell in stripped):
        raise DatasetError(f"{where}: a cell has a line break or another control character")
    return _Row(where, dict(zip(columns, stripped, strict=True)))


def _columns(csv_path: Path, header: list[str]) -> list[str]:
    columns = [name.strip().lower() for name in header]
    if len(columns) == 1 and ";" in columns[0]:
        raise DatasetError(f"{csv_path} line 1: columns are parted by ';', expected ','")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DatasetError(f"{csv_path} line 1: column '{twice[0]}' stands there twice")
    needed = ["path", "label"] if "path" in columns else ["patient", "region", "label"]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DatasetError(
            f"{csv_path} line 1: column '{missing[0]}' is missing from "
            f"'{','.join(columns)}'; expected {HEADERS}"
        )
    return columns


def _grouped_by(row: _Row) -> GroupedBy:
    if "patient" in row.cells:
        return "patient"
    return "group" if "group" in row.cells else "tile"


def _inside(row: _Row, root: Path, value: str) -> Path:
    """`root / value`; refused where that would leave `root`."""
    part = PurePosixPath(value.replace("\\", "/"))
    if part.is_absolute() or Path(value).is_absolute() or ".." in part.parts:
        raise DatasetError(f"{row.where}: '{value}' leads out of {root}")
    return root / part


def _tile_path(row: _Row, root: Path) -> Path:
    try:
        return _path(row, root) if "path" in row.cells else _region(row, root)
    except OSError as error:  # no permission, a name that is too long
        raise DatasetError(f"{row.where}: {error.strerror}: {error.filename}") from error


def _path(row: _Row, root: Path) -> Path:
    path = _inside(row, root, row.cell("path"))
    if not path.exists():
        raise DatasetError(f"{row.where}: {path} does not exist")
    return region_tile(path, f"{row.where}: ") if path.is_dir() else path


def _region(row: _Row, root: Path) -> Path:
    patient = _inside(row, root, row.cell("patient"))
    region = _inside(row, patient, row.cell("region"))
    if region.is_dir():
        return region_tile(region, f"{row.where}: ")
    found = [file for file in region_files(region.parent) if _is_called(file, region.name)]
    if len(found) > 1:
        raise DatasetError(f"{row.where}: {region}.* is {found[0].name} and {found[1].name}")
    if not found:
        raise DatasetError(f"{row.where}: neither {region} nor {region}.* exists")
    return found[0]


def _is_called(file: Path, region: str) -> bool:
    return file.name == region or file.name.startswith(f"{region}.")


def _refuse_repeated(row: _Row, label: str, first: tuple[_Row, str]) -> None:
    first_row, first_label = first
    if first_row is row:
        return
    line = first_row.where.rsplit(" ", 1)[1]
    if label != first_label:
        raise DatasetError(
            f"{row.where}: label '{label}', but line {line} gave the same tile '{first_label}'"
        )
    raise DatasetError(f"{row.where}: the tile stands on line {line} already")
