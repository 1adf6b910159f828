"""Phantom data as real files: a small hospital to train, test and demonstrate on.

    ct_data/R_001/20000101/SERIES/*.dcm                  CT of the chest
    pathology_data/Patient_001/region_001/tile.ome.tif   multiplex tiles of two classes
    pathology_data/labels.csv                            patient,region,label
    new_patient/ct/*.dcm  new_patient/*.tif              one more patient, in neither of the above
    PHANTOM.json                                         what it was made with; written last

The CT patients and the tile patients are different people, as in the public data that this stands
for. Nothing here is a model of disease: it is data on which code can be right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_train.data.phantom_files import read_mark, write_csv, write_once, write_tile
from cdt_train.data.phantom_tiles import CLASSES, Stain, patient_stain, phantom_tile

GENERATOR = 3
"""Raised with every change that alters a pixel: a folder of another version is not reused."""

NEW_TILES = 3
"""Tiles of each class that the new patient has."""

_TILES, _CT = 0, 1  # first word of each random stream, so that no two streams are the same


@dataclass(frozen=True)
class _Made:
    """What `PHANTOM.json` says."""

    seed: int
    n_patients: int
    n_ct: int
    regions_per_class: int
    generator: int = GENERATOR


def write_phantom(
    folder: Path,
    *,
    seed: int = 0,
    n_patients: int = 18,
    n_ct: int = 8,
    regions_per_class: int = 6,
) -> None:
    """Writes a phantom hospital; does nothing where the same one is there already.

    A patient depends on the seed and its own number alone: the first patients of a larger set are
    those of a smaller one.

    Args:
        folder: What to create. Files appear in it all at once, or, if the run is cut off, never.
        seed: Of every random choice.
        n_patients: Patients with tiles.
        n_ct: Patients with a CT.
        regions_per_class: Tiles of each class that a patient has.

    Raises:
        DatasetError: a count is below 1, or `folder` holds something else.
    """
    made = _Made(seed, n_patients, n_ct, regions_per_class)
    _check(made)
    write_once(folder, asdict(made), lambda partial: _write(partial, made))


def phantom_seed(folder: Path) -> int | None:
    """Returns the seed of a phantom hospital, or None for a folder that is none."""
    found = read_mark(folder)
    seed = found.get("seed") if found else None
    return seed if isinstance(seed, int) else None


def _check(made: _Made) -> None:
    for name, value in asdict(made).items():
        if name != "seed" and value < 1:
            raise DatasetError(f"{name} = {value}: phantom data need at least 1")
    if made.seed < 0:
        raise DatasetError(f"seed = {made.seed}: expected 0 or more")


def _write(folder: Path, made: _Made) -> None:
    _write_pathology(folder / "pathology_data", made)
    for number in range(1, made.n_ct + 1):
        patient = f"R_{number:03d}"
        _write_ct(folder / "ct_data" / patient / "20000101" / "SERIES", patient, made.seed, number)
    new_patient = folder / "new_patient"
    _write_ct(new_patient / "ct", "NEW_PATIENT", made.seed, 0)
    for region, label in enumerate(sorted(CLASSES)):
        for turn in range(1, NEW_TILES + 1):
            tile = _tile(made.seed, 0, turn * len(CLASSES) + region, label)
            write_tile(new_patient / f"{label}_{turn}.tif", tile)


def _write_pathology(folder: Path, made: _Made) -> None:
    rows = []
    for number in range(1, made.n_patients + 1):
        patient = f"Patient_{number:03d}"
        for region, label in _regions(made, number):
            name = f"region_{region:03d}"
            tile = _tile(made.seed, number, region, label)
            write_tile(folder / patient / name / "tile.ome.tif", tile)
            rows.append((patient, name, label))
    write_csv(folder / "labels.csv", ("patient", "region", "label"), rows)


def _regions(made: _Made, patient: int) -> Iterator[tuple[int, str]]:
    """Numbers and classes of a patient's regions, shuffled: the number tells nothing."""
    labels = [label for label in CLASSES for _ in range(made.regions_per_class)]
    order = np.random.default_rng([made.seed, _TILES, patient]).permutation(len(labels))
    for region, index in enumerate(order, start=1):
        yield region, labels[index]


def _stain(seed: int, patient: int) -> Stain:
    return patient_stain(np.random.default_rng([seed, _TILES, patient, 0]))


def _tile(seed: int, patient: int, region: int, label: str) -> NDArray[np.uint8]:
    rng = np.random.default_rng([seed, _TILES, patient, 1, region])
    return phantom_tile(rng, label, _stain(seed, patient))


def _write_ct(folder: Path, patient: str, seed: int, number: int) -> None:
    from cdt_train.data.phantom_ct import draw_chest, phantom_ct
    from cdt_train.data.phantom_dicom import write_series

    rng = np.random.default_rng([seed, _CT, number])
    chest = draw_chest(rng)
    write_series(folder, phantom_ct(rng, chest), chest.pixel_mm, patient, seed)
