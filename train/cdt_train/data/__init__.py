"""Data sets: one module a layout, one line a layout in `DATASETS`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cdt_runtime.errors import DatasetError, RecipeError
from cdt_train.data.csv_folds import read_csv
from cdt_train.data.dataset import CtSeries, LabelledTile, TileDataset
from cdt_train.data.hospital import read_hospital
from cdt_train.data.image_folders import read_image_folders
from cdt_train.data.volumes_npz import read_volumes_npz


class Layout(Protocol):
    """A reader of one layout: lists tiles and CT series without decoding an image file."""

    def __call__(self, data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
        """List what `data_dir` holds, with the CT of `ct_dir` where one is given."""
        ...


def read_medmnist(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """`cdt_train.data.medmnist.read_medmnist`, which waits with numpy until it is called."""
    from cdt_train.data.medmnist import read_medmnist as read

    return read(data_dir, ct_dir)


DATASETS: dict[str, Layout] = {
    "hospital": read_hospital,
    "image_folders": read_image_folders,
    "csv": read_csv,
    "medmnist": read_medmnist,
    "volumes_npz": read_volumes_npz,
}

HOLDS = {
    "hospital": "ct_data/ and pathology_data/",
    "image_folders": "CLASS/*.jpeg, or train/CLASS/*.jpeg with val/ and test/",
    "csv": "labels.csv, manifest.csv or folds.csv with path,label, or is such a file",
    "medmnist": "one npz with train_images and train_labels, or is that file",
    "volumes_npz": "*.npz with hu and an index CSV volume,z,y,x,label, or is that CSV",
}
"""What `--data-dir` holds in each layout, in a few words."""


def read_dataset(layout: str, data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """List a data set by the name of its layout.

    Args:
        layout: Key of `DATASETS`.
        data_dir: The data folder; for csv, medmnist and volumes_npz it may be the file itself.
        ct_dir: Where CT series lie; for the hospital layout, in place of its own `ct_data`.

    Raises:
        RecipeError: There is no such layout.
        DatasetError: There is no such folder, or what it holds can't be used.
    """
    require_layout(layout, data_dir)
    return DATASETS[layout](data_dir, ct_dir)


def require_layout(layout: str, data_dir: Path) -> None:
    """Refuse an unknown layout and a missing folder.

    Raises:
        RecipeError: There is no such layout.
        DatasetError: There is no such folder.
    """
    if layout not in DATASETS:
        known = ", ".join(DATASETS)
        raise RecipeError(f"data.layout: {layout!r}: expected one of {known}")
    if not data_dir.exists():
        raise DatasetError(f"{data_dir}: no such folder: --data-dir holds {HOLDS[layout]}")


__all__ = [
    "DATASETS",
    "HOLDS",
    "CtSeries",
    "LabelledTile",
    "Layout",
    "TileDataset",
    "read_csv",
    "read_dataset",
    "read_hospital",
    "read_image_folders",
    "read_medmnist",
    "read_volumes_npz",
    "require_layout",
]
