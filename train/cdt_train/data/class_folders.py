"""Labels from folder names: `CLASS/*.png`, or `CLASS/PATIENT/...`."""

from __future__ import annotations

import re
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.csv_rows import BY_TILE
from cdt_train.data.dataset import GroupedBy, LabelledTile
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
    tiles: list[LabelledTile] = []
    warnings: list[str] = []
    for folder in subfolders(pathology):
        found = class_tiles(folder, pathology)
        if not found:
            warnings.append(f"{folder} has no tiles and is left out")
        tiles += found
    names = sorted({tile.label for tile in tiles})
    if names and all(_PATIENT.fullmatch(name) for name in names):
        raise DatasetError(
            f"{pathology} has no labels and '{names[0]}' looks like a patient, not a class: "
            f"{HOW_TO_LABEL}"
        )
    by = grouping_of(tiles)
    if tiles and by == "tile":
        warnings.append(BY_TILE.format(source=pathology))
    return tiles, by, warnings


def class_tiles(folder: Path, root: Path) -> list[LabelledTile]:
    """The tiles of one class folder: those without a patient, then those of each.

    Args:
        folder: `CLASS/`.
        root: Tiles without a patient are groups of their own, named by their path below it.
    """
    own = [
        LabelledTile(file, folder.name, file.relative_to(root).as_posix())
        for file in region_files(folder)
    ]
    return own + [t for patient in subfolders(folder) for t in _patient_tiles(folder, patient)]


def grouping_of(tiles: list[LabelledTile]) -> GroupedBy:
    """What `patient` holds in tiles of class folders.

    Raises:
        DatasetError: some have a patient and some have none.
    """
    loose = [tile for tile in tiles if _is_loose(tile)]
    grouped = [tile for tile in tiles if not _is_loose(tile)]
    if loose and grouped:
        raise DatasetError(
            f"{loose[0].path} belongs to no patient and {grouped[0].path} to "
            f"'{grouped[0].patient}': use CLASS/PATIENT/ for all tiles or for none"
        )
    return "tile" if loose else "patient"


def _is_loose(tile: LabelledTile) -> bool:
    return "/" in tile.patient  # the path of the tile; the name of a folder has no slash


def _patient_tiles(class_folder: Path, patient: Path) -> list[LabelledTile]:
    regions = [region_tile(folder) for folder in subfolders(patient)]
    paths = sorted(region_files(patient) + regions)
    return [LabelledTile(path, class_folder.name, patient.name) for path in paths]


def looks_like_a_patient(name: str) -> bool:
    """Whether a folder is named as patients are; up to two digits may well be a class."""
    return _PATIENT.fullmatch(name) is not None and not (name.isdigit() and len(name) <= 2)
