"""The layout `volumes_npz`: CT volumes as npz files, with labelled places in a CSV beside them.

    NAME.npz               `hu` (D, H, W) int16 or float32; `spacing_mm` or `spacing_zyx` (z, y, x)
    index.csv              volume,z,y,x,label[,fold][,patient|group]; z, y, x in voxels
    NAME_nodules.csv       marks of the readers of LIDC-IDRI, in a grid of 2 mm:
                           z_vox2mm,y_vox2mm,x_vox2mm,malignancy_1to5

Each place becomes a cube of 32 voxels. A folder with an index takes its labels from there; give the
path of a nodule CSV to take nodules instead (all nodule CSVs of its folder are read). The marks of
several readers that lie within 8 mm are one nodule: benign where the median of their malignancy is
below 3, malignant above; 3 is left out, and so are marks of less than 3 mm, which have none.

Source: Armato et al. 2011 (LIDC-IDRI) for the scale of malignancy.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cdt_runtime.errors import DatasetError
from cdt_runtime.printable import counted
from cdt_train.data.assemble import assemble
from cdt_train.data.csv_folds import fold_of
from cdt_train.data.csv_rows import Row, grouped_by, inside, missing_column, read_rows
from cdt_train.data.dataset import GroupedBy, LabelledTile, TileDataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cdt_train.data.npz_volume import NpzVolume

CUBE = 32
"""Edge of a cube, voxels."""

SAME_NODULE_MM = 8.0
"""Marks of several readers that lie closer are of one nodule."""

INDEX = ("volume", "z", "y", "x", "label")
NODULES = ("z_vox2mm", "y_vox2mm", "x_vox2mm", "malignancy_1to5")
GRID_MM = 2.0

ONE_PATIENT_EACH = (
    "{source} names no patients: each volume is taken for a patient of its own, and results must "
    "not be called patient-level"
)


@dataclass(frozen=True)
class _Place:
    """The centre of a cube, and what the CSV says of it.

    `centre` is in voxels, which must have an edge of `grid_mm` where that is given.
    """

    row: Row
    volume: Path
    centre: tuple[float, float, float]
    label: str
    group: str
    split: str | None = None
    grid_mm: float | None = None


def read_volumes_npz(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """Cuts the labelled cubes out of the volumes of a folder.

    Args:
        data_dir: The folder, or one of its CSVs.
        ct_dir: Where further CT series lie, if any.

    Raises:
        DatasetError: there is no CSV with labels or more than one index, a line can't be used, or a
            volume is too small or damaged.
    """
    source, nodules = _label_files(data_dir)
    if nodules:
        places, by, warnings = _nodules(nodules)
    else:
        places, by, warnings = _indexed(source)
    if not places:
        raise DatasetError(f"{source}: no nodule has a malignancy other than 3: nothing to learn")
    tiles = _cut(places, warnings)
    return assemble(tiles, by, warnings, source=source, ct_dir=ct_dir)


def _label_files(data_dir: Path) -> tuple[Path, list[Path]]:
    """The index, or the nodule CSVs; the first path names the data set in messages."""
    folder = data_dir if data_dir.is_dir() else data_dir.parent
    files = sorted(folder.glob("*.csv"))
    nodules = [file for file in files if set(NODULES) <= _columns(file)]
    if data_dir in nodules:
        return folder, nodules
    if not data_dir.is_dir():
        return data_dir, []
    indices = [file for file in files if set(INDEX) <= _columns(file)]
    if len(indices) > 1:
        names = ", ".join(file.name for file in indices)
        raise DatasetError(f"{folder} holds the indices {names}: give the path of the one to use")
    if not indices and not nodules:
        raise DatasetError(
            f"{folder} holds no CSV with the columns {','.join(INDEX)}: labels are read, never "
            "made up"
        )
    return (indices[0], []) if indices else (folder, nodules)


def _columns(file: Path) -> set[str]:
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            return {name.strip().lower() for name in next(csv.reader(lines), [])}
        except csv.Error:
            return set()


def _indexed(csv_path: Path) -> tuple[list[_Place], GroupedBy, list[str]]:
    rows = read_rows(
        csv_path,
        lambda columns: missing_column(columns, INDEX, f"'{','.join(INDEX)}'"),
        {"patient_id": "patient", "group_id": "group", "split": "fold"},
    )
    by = grouped_by(rows[0])
    places = []
    for row in rows:
        volume = inside(row, csv_path.parent, row.cell("volume"))
        if volume.suffix != ".npz" or not volume.is_file():
            raise DatasetError(f"{row.where}: {volume} is no npz file")
        centre = (_number(row, "z"), _number(row, "y"), _number(row, "x"))
        group = row.cell("volume") if by == "tile" else row.cell(by)
        places.append(_Place(row, volume, centre, row.cell("label"), group, fold_of(row)))
    _refuse_repeated(places)
    if by == "tile":
        return places, "group", [ONE_PATIENT_EACH.format(source=csv_path)]
    return places, by, []


def _refuse_repeated(places: Iterable[_Place]) -> None:
    first: dict[tuple[Any, ...], _Place] = {}
    for place in places:
        other = first.setdefault((place.volume, place.centre), place)
        if other is not place:
            raise DatasetError(f"{place.row.where}: the place stands on line {other.row.line} too")


def _nodules(files: Iterable[Path]) -> tuple[list[_Place], GroupedBy, list[str]]:
    places: list[_Place] = []
    unsure = unrated = 0
    for file in files:
        rows = read_rows(file, lambda columns: missing_column(columns, NODULES, ",".join(NODULES)))
        volume = _volume_of(file)
        rated = [row for row in rows if row.cells["malignancy_1to5"]]
        unrated += len(rows) - len(rated)
        for marks in _same_nodule(rated):
            rating = median(_malignancy(row) for row in marks)
            unsure += rating == 3
            if rating != 3:
                label = "benign" if rating < 3 else "malignant"
                place = _Place(marks[0], volume, _mean(marks), label, volume.name, None, GRID_MM)
                places.append(place)
    folder = next(iter(files)).parent
    return (
        places,
        "group",
        [
            ONE_PATIENT_EACH.format(source=folder),
            f"{counted(unrated, 'mark')} without malignancy and {counted(unsure, 'nodule')} of "
            "malignancy 3 left out",
        ],
    )


def _volume_of(file: Path) -> Path:
    """`NAME.npz` or `NAME_*.npz` of `NAME_nodules.csv`."""
    name = file.stem.removesuffix("_nodules")
    found = [
        path
        for path in sorted(file.parent.glob("*.npz"))
        if path.stem == name or path.stem.startswith(f"{name}_")
    ]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DatasetError(f"{file}: expected one volume {name}*.npz beside it, found {names}")
    return found[0]


def _same_nodule(rows: list[Row]) -> list[list[Row]]:
    """The marks of each nodule."""
    if len(rows) < 2:
        return [rows] if rows else []
    from scipy.cluster.hierarchy import fclusterdata

    points = [[GRID_MM * value for value in _point(row)] for row in rows]
    numbers = fclusterdata(points, SAME_NODULE_MM, criterion="distance", method="average")
    return [
        [row for row, mine in zip(rows, numbers, strict=True) if mine == number]
        for number in sorted(set(numbers.tolist()))
    ]


def _mean(marks: list[Row]) -> tuple[float, float, float]:
    z, y, x = zip(*(_point(row) for row in marks), strict=True)
    return (sum(z) / len(z), sum(y) / len(y), sum(x) / len(x))


def _point(row: Row) -> tuple[float, float, float]:
    return (_number(row, "z_vox2mm"), _number(row, "y_vox2mm"), _number(row, "x_vox2mm"))


def _malignancy(row: Row) -> float:
    value = _number(row, "malignancy_1to5")
    if not 1 <= value <= 5:
        raise DatasetError(f"{row.where}: malignancy_1to5 is {value:g}, expected 1 to 5")
    return value


def _number(row: Row, column: str) -> float:
    text = row.cell(column)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e6:  # NaN compares false
        raise DatasetError(f"{row.where}: {column} is '{text}', expected a number")
    return value


def _cut(places: list[_Place], warnings: list[str]) -> list[LabelledTile]:
    """The cubes, in the order of their places; each volume is read once."""
    from cdt_train.data.npz_volume import read_npz_hu

    tiles: dict[int, LabelledTile] = {}
    moved = 0
    for volume in dict.fromkeys(place.volume for place in places):
        found = read_npz_hu(volume)
        if min(found.hu.shape) < CUBE:
            raise DatasetError(
                f"{volume}: array 'hu' has the shape {found.hu.shape}, expected at least {CUBE} "
                "voxels on every axis"
            )
        for index, place in enumerate(places):
            if place.volume == volume:
                _check_grid(place, found)
                corner, shifted = _corner(place, found)
                moved += shifted
                tiles[index] = _tile(place, corner, found.hu)
    if moved:
        warnings.append(f"{counted(moved, 'cube')} moved inwards from the border of the volume")
    return [tiles[index] for index in range(len(places))]


def _check_grid(place: _Place, volume: NpzVolume) -> None:
    """Refuse places of another grid; a volume that tells no spacing is taken at its word."""
    grid, spacing = place.grid_mm, volume.spacing_mm
    if grid is not None and spacing is not None and max(abs(s - grid) for s in spacing) > 0.01:
        raise DatasetError(
            f"{place.row.where}: is in a grid of {grid:g} mm, but {place.volume.name} has voxels "
            f"of {', '.join(f'{value:g}' for value in spacing)} mm (z, y, x): resample it"
        )


def _corner(place: _Place, volume: NpzVolume) -> tuple[tuple[int, ...], bool]:
    """The first voxel of the cube, and whether it was moved to lie in the volume."""
    corner, shifted = [], False
    for axis, centre, length in zip("zyx", place.centre, volume.hu.shape, strict=True):
        if not 0 <= centre <= length - 1:
            raise DatasetError(
                f"{place.row.where}: {axis} is {centre:g}, expected 0 to {length - 1} in "
                f"{place.volume.name}"
            )
        first = round(centre) - CUBE // 2
        corner.append(min(max(first, 0), length - CUBE))
        shifted |= corner[-1] != first
    return tuple(corner), shifted


def _tile(place: _Place, corner: tuple[int, ...], hu: NDArray[Any]) -> LabelledTile:
    # A copy, so that the volume itself can be let go.
    cube = hu[tuple(slice(first, first + CUBE) for first in corner)].copy()
    at = ",".join(f"{value:g}" for value in place.centre)
    return LabelledTile(
        path=place.volume,
        label=place.label,
        patient=place.group,
        split=place.split,
        pixels=cube[..., None],
        name=f"{place.volume.name}[{at}]",
    )
