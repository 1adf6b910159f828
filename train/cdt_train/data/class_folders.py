"""Labels from folder names: `CLASS/*.png`, or `CLASS/PATIENT/...`."""

from __future__ import annotations

import re
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.dataset import GroupedBy, LabelledTile
from cdt_train.data.labels_csv import BY_TILE
from cdt_train.data.regions import region_files, region_tile, subfolders

HOW_TO_LABEL = (
    "write a labels.csv with the header 'patient,region,label' or 'path,label,patient', "
    "or sort the tiles into pathology_data/CLASS/PATIENT/"
)

# Patients' folders without a label file look like class folders. Taking their names as labels
# would train a model that tells patients apart and call it a diagnosis.
_PATIENT = re.compile(
    r"(patient|pat|pt|p|subject|subj|sub|case|donor|person|id|r|tcga|ct|mrn)?[-_ .]*[\d.\-_ ]+\w?",
    re.IGNORECASE,
)


def read_class_folders(pathology: Path) -> tuple[list[LabelledTile], GroupedBy, list[str]]:
    """Reads the tiles of class folders, sorted by path; none where there are no such folders.

    In `CLASS/PATIENT/` a file is a tile, and a folder is a region.

    Returns:
        The tiles, what their `patient` holds, and warnings.

    Raises:
        DatasetError: folders are named as patients are, or some classes have patients and
            others have none.
    """
    loose: list[LabelledTile] = []
    grouped: list[LabelledTile] = []
    warnings: list[str] = []
    for folder in subfolders(pathology):
        own = [_loose_tile(pathology, file) for file in region_files(folder)]
        below = [tile for patient in subfolders(folder) for tile in _patient_tiles(folder, patient)]
        if not own and not below:
            warnings.append(f"{folder} has no tiles and is left out")
        loose += own
        grouped += below
    _refuse_patients(pathology, loose + grouped)
    if loose and grouped:
        raise DatasetError(
            f"{loose[0].path} belongs to no patient and {grouped[0].path} to "
            f"'{grouped[0].patient}': use CLASS/PATIENT/ for all tiles or for none"
        )
    if loose:
        warnings.append(BY_TILE.format(source=pathology))
    return loose or grouped, "tile" if loose else "patient", warnings


def _loose_tile(pathology: Path, file: Path) -> LabelledTile:
    return LabelledTile(file, file.parent.name, file.relative_to(pathology).as_posix())


def _patient_tiles(class_folder: Path, patient: Path) -> list[LabelledTile]:
    regions = [region_tile(folder) for folder in subfolders(patient)]
    paths = sorted(region_files(patient) + regions)
    return [LabelledTile(path, class_folder.name, patient.name) for path in paths]


def _refuse_patients(pathology: Path, tiles: list[LabelledTile]) -> None:
    names = sorted({tile.label for tile in tiles})
    if names and all(_PATIENT.fullmatch(name) for name in names):
        raise DatasetError(
            f"{pathology} has no labels and '{names[0]}' looks like a patient, not a class: "
            f"{HOW_TO_LABEL}"
        )
