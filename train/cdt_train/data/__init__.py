"""Data sets: one module a layout, one line a layout in `DATASETS`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cdt_train.data.csv_folds import read_csv
from cdt_train.data.dataset import CtSeries, LabelledTile, TileDataset
from cdt_train.data.hospital import read_hospital
from cdt_train.data.image_folders import read_image_folders


class Layout(Protocol):
    """A reader of one layout: lists tiles and CT series without decoding an image file."""

    def __call__(self, data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
        """List what `data_dir` holds, with the CT of `ct_dir` where one is given."""
        ...


DATASETS: dict[str, Layout] = {
    "hospital": read_hospital,
    "image_folders": read_image_folders,
    "csv": read_csv,
}

HOLDS = {
    "hospital": "ct_data/ and pathology_data/",
    "image_folders": "CLASS/*.jpeg, or train/CLASS/*.jpeg with val/ and test/",
    "csv": "labels.csv, manifest.csv or folds.csv with path,label, or is such a file",
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
]
