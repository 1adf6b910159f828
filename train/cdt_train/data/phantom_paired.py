"""Phantom data with a planted link between a patient's CT and the class of the patient's tiles.

    ct_data/Patient_001/20000101/SERIES/*.dcm            CT of the chest, with one of two diseases
    pathology_data/Patient_001/region_001/tile.ome.tif   tiles of the same patient, all of one class
    pathology_data/labels.csv                            patient,region,label
    ct_types.csv                                         patient,label,ct_type: what was planted
    PHANTOM.json                                         what it was made with; written last

The positive control of an evaluation: here a model that uses CT must beat the same model without,
by about as much as `agreement` allows; at an agreement of 0.5 it must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cdt_runtime.errors import DatasetError
from cdt_train.data.phantom import GENERATOR
from cdt_train.data.phantom_ct import SIZE, draw_chest, phantom_ct
from cdt_train.data.phantom_dicom import write_series
from cdt_train.data.phantom_files import write_csv, write_once, write_tile
from cdt_train.data.phantom_findings import CT_TYPES, draw_finding
from cdt_train.data.phantom_tiles import CLASSES, patient_stain, phantom_tile

CT_SIZE = 128
"""Pixels of a row and of a column of a CT: what the CT encoder takes."""

# first word of each random stream; phantom.py has 0 and 1
_CLASS, _AGREES, _STAIN, _TILE, _CHEST, _FINDING = range(2, 8)


@dataclass(frozen=True)
class _Made:
    """What `PHANTOM.json` says."""

    seed: int
    n_patients: int
    tiles_per_patient: int
    agreement: float
    mixing: float
    generator: int = GENERATOR


@dataclass(frozen=True)
class _Patient:
    number: int
    label: str
    ct_type: str

    @property
    def name(self) -> str:
        return f"Patient_{self.number:03d}"


def write_paired_phantom(
    folder: Path,
    *,
    seed: int = 0,
    n_patients: int = 60,
    tiles_per_patient: int = 3,
    agreement: float = 0.9,
    mixing: float = 0.35,
) -> None:
    """Writes a phantom hospital whose CT tells of the tiles; nothing where the same one is already.

    Classes are balanced over patients, and each class has its type of CT: `CLASSES` and `CT_TYPES`
    in their order. With another `agreement`, the same seed gives the same tiles and the same
    chests, and whoever agreed at a lower one still does; the diseases of the others change.

    Args:
        folder: What to create. Files appear in it all at once, or, if the run is cut off, never.
        seed: Of every random choice.
        n_patients: Each has tiles and a CT.
        tiles_per_patient: All of the patient's one class.
        agreement: Share of the patients of each class whose CT is of the class's own type:
            `round(agreement * n)` of n. With two classes 0.5 means that CT tells nothing, if n
            is even.
        mixing: 0 to 1, how far the arrangement of each tile is drawn from what the classes share.
            At 0 the tiles are as easy as those of `write_phantom`, at 1 they tell nothing.

    Raises:
        DatasetError: a parameter is out of its range, or `folder` holds something else.
    """
    made = _Made(seed, n_patients, tiles_per_patient, float(agreement), float(mixing))
    _check(made)
    write_once(folder, asdict(made), lambda partial: _write(partial, made))


def _check(made: _Made) -> None:
    if made.seed < 0:
        raise DatasetError(f"seed = {made.seed}: expected 0 or more")
    if made.n_patients < len(CLASSES):
        raise DatasetError(
            f"n_patients = {made.n_patients}: paired phantom data need at least {len(CLASSES)}, "
            "one of each class"
        )
    if made.tiles_per_patient < 1:
        raise DatasetError(
            f"tiles_per_patient = {made.tiles_per_patient}: phantom data need at least 1"
        )
    for name in ("agreement", "mixing"):
        value = getattr(made, name)
        if not 0 <= value <= 1:
            raise DatasetError(f"{name} = {value:g}: expected 0 to 1")


def _write(folder: Path, made: _Made) -> None:
    patients = _patients(made)
    rows = []
    for patient in patients:
        rows += [(patient.name, f"region_{r:03d}", patient.label) for r in _regions(made)]
        _write_tiles(folder / "pathology_data" / patient.name, patient, made)
        _write_ct(folder / "ct_data" / patient.name / "20000101" / "SERIES", patient, made.seed)
    write_csv(folder / "pathology_data" / "labels.csv", ("patient", "region", "label"), rows)
    truth = [(patient.name, patient.label, patient.ct_type) for patient in patients]
    write_csv(folder / "ct_types.csv", ("patient", "label", "ct_type"), truth)


def _regions(made: _Made) -> range:
    return range(1, made.tiles_per_patient + 1)


def _patients(made: _Made) -> list[_Patient]:
    """Every patient's class and type of CT, by number."""
    labels = dict(enumerate(_labels(made), start=1))
    patients = []
    for index, label in enumerate(CLASSES):
        numbers = [number for number, own in labels.items() if own == label]
        rng = np.random.default_rng([made.seed, _AGREES, index])
        turn = rng.permutation(len(numbers))
        others = rng.integers(1, len(CT_TYPES), len(numbers))
        n_agree = round(made.agreement * len(numbers))
        for number, rank, other in zip(numbers, turn, others, strict=True):
            shift = 0 if rank < n_agree else int(other)
            ct_type = CT_TYPES[(index + shift) % len(CT_TYPES)]
            patients.append(_Patient(number, label, ct_type))
    return sorted(patients, key=lambda patient: patient.number)


def _labels(made: _Made) -> Iterator[str]:
    """Each class once among every few patients, in an order that tells nothing."""
    for number in range(made.n_patients):
        block, place = divmod(number, len(CLASSES))
        order = np.random.default_rng([made.seed, _CLASS, block]).permutation(len(CLASSES))
        yield CLASSES[order[place]]


def _write_tiles(folder: Path, patient: _Patient, made: _Made) -> None:
    stain = patient_stain(np.random.default_rng([made.seed, _STAIN, patient.number]))
    for region in _regions(made):
        rng = np.random.default_rng([made.seed, _TILE, patient.number, region])
        tile = phantom_tile(rng, patient.label, stain, made.mixing)
        write_tile(folder / f"region_{region:03d}" / "tile.ome.tif", tile)


def _write_ct(folder: Path, patient: _Patient, seed: int) -> None:
    rng = np.random.default_rng([seed, _CHEST, patient.number])
    finding = draw_finding(np.random.default_rng([seed, _FINDING, patient.number]), patient.ct_type)
    chest = draw_chest(rng)
    hu = phantom_ct(rng, chest, CT_SIZE, finding)
    write_series(folder, hu, chest.pixel_mm * SIZE / CT_SIZE, patient.name, seed)
