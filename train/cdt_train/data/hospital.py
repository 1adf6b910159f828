"""The layout of a hospital's export: `DATA_DIR/ct_data/` and `DATA_DIR/pathology_data/`.

    ct_data/R_001/20000101/SERIES/*.dcm              every folder with DICOM files is one series;
                                                     its patient is the first folder name
    pathology_data/Patient_001/region_001/*.tif      one region: one file, or one file a marker
    labels.csv                                       here or in pathology_data

Labels are read, never made up. They come from `labels.csv`, with the columns

    patient,region,label        a region folder, its one file, or a file REGION.*
    path,label[,patient|group]  a path relative to the CSV

or, where there is no such file, from class folders: `pathology_data/CLASS/*.png`, or
`pathology_data/CLASS/PATIENT/...`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.class_folders import HOW_TO_LABEL, read_class_folders
from cdt_train.data.dataset import CtSeries, TileDataset
from cdt_train.data.labels_csv import read_labels_csv

_DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}


def read_hospital(data_dir: Path) -> TileDataset:
    """Lists the tiles with their labels and the CT series of a hospital's export.

    No image is opened: a file that can't be decoded is reported by the reader of tiles or of CT.

    Args:
        data_dir: The folder that holds `ct_data` and `pathology_data`.

    Raises:
        DatasetError: a folder or the labels are missing, or a line of the labels can't be used.
    """
    pathology = _folder(data_dir, "pathology_data", "the tiles")
    ct_data = _folder(data_dir, "ct_data", "the CT series")
    csv_path = _labels_csv(data_dir, pathology)
    if csv_path is not None:
        tiles, grouped_by, warnings = read_labels_csv(csv_path, pathology)
    else:
        tiles, grouped_by, warnings = read_class_folders(pathology)
    if not tiles:
        raise DatasetError(f"{data_dir} has no labelled tiles: {HOW_TO_LABEL}")
    classes = tuple(sorted({tile.label for tile in tiles}))
    if len(classes) < 2:
        source = csv_path or pathology
        raise DatasetError(f"{source} has one class only, '{classes[0]}': at least 2 are needed")
    warnings += _look_alikes(classes)
    ct = tuple(_ct_series(ct_data))
    return TileDataset(tuple(tiles), ct, classes, grouped_by, tuple(warnings))


def _look_alikes(classes: tuple[str, ...]) -> list[str]:
    """A slip of the keyboard makes a class of its own; only the user knows whether it is one."""
    spelling: dict[str, str] = {}
    warnings = []
    for label in classes:
        first = spelling.setdefault(" ".join(re.split(r"[\s_-]+", label.casefold())), label)
        if first != label:
            warnings.append(f"labels '{first}' and '{label}' are two classes: is that meant?")
    return warnings


def _folder(data_dir: Path, name: str, what: str) -> Path:
    folder = data_dir / name
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder: {what} are expected there")
    return folder


def _labels_csv(data_dir: Path, pathology: Path) -> Path | None:
    found = [path for path in (data_dir / "labels.csv", pathology / "labels.csv") if path.is_file()]
    if len(found) > 1:
        raise DatasetError(f"{found[0]} and {found[1]} both exist: keep the one that holds")
    return found[0] if found else None


def _ct_series(ct_data: Path) -> list[CtSeries]:
    """Every folder below `ct_data` that has DICOM files of its own, sorted by path."""
    series = []
    for folder in _walk(ct_data):
        if not any(_is_dicom(path) for path in sorted(folder.iterdir())):
            continue
        if folder == ct_data:
            raise DatasetError(
                f"{ct_data} has DICOM files of no patient: move them to ct_data/PATIENT/"
            )
        series.append(CtSeries(folder, folder.relative_to(ct_data).parts[0]))
    if not series:
        raise DatasetError(f"{ct_data} has no DICOM files: expected PATIENT/DATE/SERIES/*.dcm")
    return sorted(series, key=lambda one: one.path)


def _walk(top: Path) -> Iterator[Path]:
    """Folders below `top`, through links too (archives are often linked in), each only once."""
    seen = set()
    for name, below, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [folder for folder in below if not folder.startswith(".")]
        yield Path(name)


def _is_dicom(path: Path) -> bool:
    """By its suffix, or, as archives often write files without one, by the mark at byte 128."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
