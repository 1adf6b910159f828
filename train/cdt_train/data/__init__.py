"""Data sets: one module a layout, one line a layout in `DATASETS`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

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

__all__ = [
    "DATASETS",
    "HOLDS",
    "CtSeries",
    "LabelledTile",
    "Layout",
    "TileDataset",
    "read_csv",
    "read_hospital",
    "read_image_folders",
    "read_medmnist",
    "read_volumes_npz",
]
