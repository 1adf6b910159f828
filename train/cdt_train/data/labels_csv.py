"""Labels of the hospital layout: `patient,region,label` or `path,label`."""

from __future__ import annotations

from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.csv_rows import (
    BY_TILE,
    Row,
    Seen,
    existing_tile,
    grouped_by,
    inside,
    missing_column,
    read_rows,
)
from cdt_train.data.dataset import GroupedBy, LabelledTile
from cdt_train.data.regions import region_files, region_tile

HEADERS = "'patient,region,label' or 'path,label' (with 'patient' or 'group' if known)"


def read_labels_csv(
    csv_path: Path, pathology: Path
) -> tuple[list[LabelledTile], GroupedBy, list[str]]:
    """Reads the tiles that a label file names, in its order.

    Args:
        csv_path: The label file.
        pathology: The folder in which PATIENT/REGION of `patient,region,label` are looked up.

    Returns:
        The tiles, what their `patient` holds, and warnings.

    Raises:
        DatasetError: a column is missing; or a line has an empty cell, names a tile that does not
            exist, lies outside the folder, or was named before.
    """
    rows = read_rows(csv_path, _wrong_columns)
    by = grouped_by(rows[0])
    root = csv_path.parent if "path" in rows[0].cells else pathology
    tiles, seen = [], Seen()
    for row in rows:
        path = _tile_path(row, root)
        label = row.cell("label")
        seen.add(row, path, label)
        group = path.relative_to(root).as_posix() if by == "tile" else row.cell(by)
        tiles.append(LabelledTile(path, label, group))
    return tiles, by, [BY_TILE.format(source=csv_path)] if by == "tile" else []


def _wrong_columns(columns: list[str]) -> str | None:
    needed = ["path", "label"] if "path" in columns else ["patient", "region", "label"]
    return missing_column(columns, needed, HEADERS)


def _tile_path(row: Row, root: Path) -> Path:
    if "path" in row.cells:
        return existing_tile(row, inside(row, root, row.cell("path")))
    try:
        return _region(row, root)
    except OSError as error:  # no permission, a name that is too long
        raise DatasetError(f"{row.where}: {error.strerror}: {error.filename}") from error


def _region(row: Row, root: Path) -> Path:
    patient = inside(row, root, row.cell("patient"))
    region = inside(row, patient, row.cell("region"))
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
