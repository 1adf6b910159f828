"""A data set in memory: every tile and every CT read once, preprocessed, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_runtime.ct import read_series
from cdt_runtime.errors import CdtError, DatasetError
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.tile import Tile, match_channels, read_tile
from cdt_train.config import DEFAULT_MARKERS, DataRecipe
from cdt_train.data.dataset import LabelledTile, TileDataset

T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]
RGB = ("R", "G", "B")


@dataclass(frozen=True, eq=False)
class TileArrays:
    """Preprocessed tiles.

    Attributes:
        tiles: `(n, M, S, S)`, uint8 or float32.
        labels: `(n,)` int64, index into `classes`.
        groups: `(n,)` int64; tiles of one patient (or group) share a number.
        classes: class names.
        names: path of each tile relative to the data folder.
        sha256: hash of each tile's file.
    """

    tiles: Tensor
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    sha256: tuple[str, ...]

    def take(self, chosen: NDArray[np.int64]) -> TileArrays:
        """Return the chosen tiles, in that order."""
        return replace(
            self,
            tiles=self.tiles[torch.from_numpy(chosen)],
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            names=tuple(self.names[i] for i in chosen),
            sha256=tuple(self.sha256[i] for i in chosen),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class CtArrays:
    """Preprocessed volumes.

    Attributes:
        volumes: `(n, W, D, S, S)` float32.
        patients: patient of each.
    """

    volumes: Tensor
    patients: tuple[str, ...]

    def without(self, patients: Iterable[str]) -> CtArrays:
        """Return the volumes of all other patients."""
        out = set(patients)
        kept = [i for i, patient in enumerate(self.patients) if patient not in out]
        return CtArrays(self.volumes[kept], tuple(self.patients[i] for i in kept))

    def __len__(self) -> int:
        return len(self.patients)


def choose_preprocess(dataset: TileDataset, recipe: DataRecipe) -> Preprocess:
    """Fix the preprocessing by the recipe and, where that leaves it open, by the first tile."""
    first = read_tile(dataset.tiles[0].path)
    channels = recipe.channels or (RGB if first.channels == RGB else DEFAULT_MARKERS)
    return Preprocess(
        channels=tuple(channels),
        image_size=recipe.image_size,
        tile_dtype="uint8" if first.pixels.dtype == np.uint8 else "float32",
        tile_mpp=_input_mpp(first, recipe.image_size),
        fill_missing=recipe.channel_dropout > 0 and tuple(channels) != RGB,
        ct_depth=recipe.ct_depth,
        slice_size=recipe.slice_size,
        hu_windows=recipe.hu_windows,
    )


def load_tiles(
    tiles: Sequence[LabelledTile],
    classes: tuple[str, ...],
    preprocess: Preprocess,
    data_dir: Path,
    progress: Progress[LabelledTile],
) -> TileArrays:
    """Read and preprocess tiles.

    Raises:
        DatasetError: a tile can't be used, or shows no tissue; the line names it.
    """
    arrays, hashes = [], []
    for tile in progress(tiles, "reading tiles"):
        name = _relative(tile.path, data_dir)
        try:
            found = read_tile(tile.path)
            pixels, _, _ = match_channels(found, preprocess.channels)
            array = preprocess.tile(pixels, found.bits, name=found.source)
        except CdtError as error:
            raise DatasetError(f"{name}: {error}") from error
        if preprocess.is_blank(array):
            raise DatasetError(f"{name}: shows no tissue (every channel is flat): leave it out")
        arrays.append(array)
        hashes.append(found.sha256)
    patients = sorted({tile.patient for tile in tiles})
    return TileArrays(
        tiles=torch.from_numpy(np.stack(arrays)),
        labels=np.array([classes.index(tile.label) for tile in tiles], dtype=np.int64),
        groups=np.array([patients.index(tile.patient) for tile in tiles], dtype=np.int64),
        classes=classes,
        names=tuple(_relative(tile.path, data_dir) for tile in tiles),
        sha256=tuple(hashes),
    )


def load_ct(dataset: TileDataset, preprocess: Preprocess, progress: Progress[int]) -> CtArrays:
    """Read and preprocess every CT series.

    Raises:
        DatasetError: a series can't be used; the line names its folder and patient.
    """
    volumes = []
    for index in progress(range(len(dataset.ct)), "reading CT"):
        series = dataset.ct[index]
        try:
            volume = read_series(series.path, min_slices=preprocess.min_slices)
        except CdtError as error:
            raise DatasetError(f"ct_data/{series.patient}: {error}") from error
        volumes.append(preprocess.ct(volume)[0])
    return CtArrays(
        torch.from_numpy(np.stack(volumes)), tuple(series.patient for series in dataset.ct)
    )


def _input_mpp(tile: Tile, image_size: int) -> float | None:
    if tile.mpp is None:
        return None
    side: int = min(tile.pixels.shape[:2])
    return round(tile.mpp * side / image_size, 4)


def _relative(path: Path, data_dir: Path) -> str:
    return path.relative_to(data_dir).as_posix()
