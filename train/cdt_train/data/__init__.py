"""Data sets: one module a layout, one line a layout in `DATASETS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cdt_train.data.dataset import CtSeries, LabelledTile, TileDataset
from cdt_train.data.hospital import read_hospital

DATASETS: dict[str, Callable[[Path], TileDataset]] = {"hospital": read_hospital}

__all__ = ["DATASETS", "CtSeries", "LabelledTile", "TileDataset", "read_hospital"]
