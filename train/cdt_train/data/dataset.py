"""What every layout of training data is read into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GroupedBy = Literal["patient", "group", "tile"]


@dataclass(frozen=True)
class LabelledTile:
    """One pathology tile and the label that somebody gave it.

    Attributes:
        path: An image file, or a region folder with one file a marker.
        label: The class, as written in the data set.
        patient: The group that folds are made by: the tiles of one group never part.
    """

    path: Path
    label: str
    patient: str


@dataclass(frozen=True)
class CtSeries:
    """One folder of DICOM files, unread: the CT reader judges what is in it."""

    path: Path
    patient: str


@dataclass(frozen=True)
class TileDataset:
    """Labelled tiles, CT series, and what is known about them before a pixel is read.

    Attributes:
        tiles: In the order of the label file, or sorted by path for class folders.
        ct: Sorted by path; its patients need not be those of the tiles.
        classes: Every label, sorted.
        grouped_by: What `LabelledTile.patient` holds; results may be called patient-level only
            where it is "patient".
        warnings: One line each, to be shown to the user and stored with every result.
    """

    tiles: tuple[LabelledTile, ...]
    ct: tuple[CtSeries, ...]
    classes: tuple[str, ...]
    grouped_by: GroupedBy
    warnings: tuple[str, ...] = ()
