"""What every layout of training data is read into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

GroupedBy = Literal["patient", "group", "tile"]


@dataclass(frozen=True)
class LabelledTile:
    """One pathology tile (or cube of a volume) and the label that somebody gave it.

    Attributes:
        path: An image file, or a region folder with one file a marker; for `pixels`, their file.
        label: The class, as written in the data set.
        patient: The group that folds are made by: the tiles of one group never part.
        split: Where the data set puts it: "train", "val", "test" or a fold's number; None where
            it does not say.
        pixels: `(H, W, C)` or `(D, H, W, C)`, uint8, int16 or float32, of a tile that is no image
            file.
        name: What results and messages call a tile that has `pixels`.
    """

    path: Path
    label: str
    patient: str
    split: str | None = None
    pixels: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    name: str | None = None


@dataclass(frozen=True)
class CtSeries:
    """One folder of DICOM files or one npz volume, unread: its reader judges what is in it.

    Attributes:
        path: The folder or the npz file.
        patient: Whose it is.
        name: What results and messages call it; None for its path below the data folder.
    """

    path: Path
    patient: str
    name: str | None = None


@dataclass(frozen=True)
class TileDataset:
    """Labelled tiles, CT series, and what is known about them before a pixel is read.

    Attributes:
        tiles: In the order of the label file, or sorted by path for class folders.
        ct: Sorted by path; its patients need not be those of the tiles; may be empty.
        classes: Every label, sorted; or in the order that the data set numbers them.
        grouped_by: What `LabelledTile.patient` holds; results may be called patient-level only
            where it is "patient".
        warnings: One line each, to be shown to the user and stored with every result.
    """

    tiles: tuple[LabelledTile, ...]
    ct: tuple[CtSeries, ...]
    classes: tuple[str, ...]
    grouped_by: GroupedBy
    warnings: tuple[str, ...] = ()


def tile_name(tile: LabelledTile, data_dir: Path) -> str:
    """The name of a tile in results and messages: its path below the data folder if it lies there.

    Args:
        tile: Any tile.
        data_dir: The data folder, or the one file that the data set is.
    """
    return tile.name or name_below(tile.path, data_dir)


def name_below(path: Path, data_dir: Path) -> str:
    """`path` relative to the data folder, or to the folder of the file that the data set is."""
    for base in (data_dir, data_dir.parent):
        if path.is_relative_to(base) and path != base:
            return path.relative_to(base).as_posix()
    return path.as_posix()
