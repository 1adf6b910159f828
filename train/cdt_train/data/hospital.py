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

from dataclasses import replace
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.assemble import assemble
from cdt_train.data.class_folders import HOW_TO_LABEL, read_class_folders
from cdt_train.data.ct_search import dicom_folders
from cdt_train.data.dataset import CtSeries, TileDataset
from cdt_train.data.labels_csv import read_labels_csv


def read_hospital(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """Lists the tiles with their labels and the CT series of a hospital's export.

    No image is opened: a file that can't be decoded is reported by the reader of tiles or of CT.

    Args:
        data_dir: The folder that holds `ct_data` and `pathology_data`.
        ct_dir: Where CT series lie, in place of `ct_data`.

    Raises:
        DatasetError: a folder or the labels are missing, or a line of the labels can't be used.
    """
    pathology = _folder(data_dir, "pathology_data", "the tiles")
    own_ct = None if ct_dir else _folder(data_dir, "ct_data", "the CT series")
    csv_path = _labels_csv(data_dir, pathology)
    if csv_path is not None:
        tiles, grouped_by, warnings = read_labels_csv(csv_path, pathology)
    else:
        tiles, grouped_by, warnings = read_class_folders(pathology)
    if not tiles:
        raise DatasetError(f"{data_dir} has no labelled tiles: {HOW_TO_LABEL}")
    source = csv_path or pathology
    dataset = assemble(tiles, grouped_by, warnings, source=source, ct_dir=ct_dir)
    return replace(dataset, ct=tuple(_ct_series(own_ct))) if own_ct else dataset


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
    folders = dicom_folders(ct_data)
    if ct_data in folders:
        raise DatasetError(
            f"{ct_data} has DICOM files of no patient: move them to ct_data/PATIENT/"
        )
    if not folders:
        raise DatasetError(f"{ct_data} has no DICOM files: expected PATIENT/DATE/SERIES/*.dcm")
    return [CtSeries(folder, folder.relative_to(ct_data).parts[0]) for folder in folders]
