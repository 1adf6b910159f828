"""A data set in memory: every tile and every CT read once, preprocessed, as tensors."""

from __future__ import annotations

from collections import Counter
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
from cdt_runtime.markers import MARKERS
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.tile import Tile, match_channels, read_tile
from cdt_train.config import DataRecipe
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
        sha256: hash of each series.
    """

    volumes: Tensor
    patients: tuple[str, ...]
    sha256: tuple[str, ...]

    def without(self, patients: Iterable[str]) -> CtArrays:
        """Return the volumes of all other patients."""
        out = set(patients)
        kept = [i for i, patient in enumerate(self.patients) if patient not in out]
        return CtArrays(
            self.volumes[kept],
            tuple(self.patients[i] for i in kept),
            tuple(self.sha256[i] for i in kept),
        )

    def __len__(self) -> int:
        return len(self.patients)


@dataclass(frozen=True)
class Survey:
    """What the tiles of a data set are like, before any is kept.

    Attributes:
        rgb: whether they are RGB.
        bits: significant bits that their samples need, by the brightest of all; 8 for bytes.
        floats: whether any has floating-point samples.
        mpp: median microns a pixel of the tile input, or None where no tile says.
        warnings: what their reader had to say, each once, with the number of tiles.
    """

    rgb: bool
    bits: int
    floats: bool
    mpp: float | None
    warnings: tuple[str, ...]


def survey_tiles(
    tiles: Sequence[LabelledTile],
    image_size: int,
    data_dir: Path,
    progress: Progress[LabelledTile],
) -> Survey:
    """Read every tile once to learn what the preprocessing must allow for.

    Raises:
        DatasetError: a tile can't be read; the line names it.
    """
    brightest, widest, floats, rgb = 0.0, 8, False, []
    scales, notes = [], Counter[str]()
    for tile in progress(tiles, "surveying tiles"):
        found = _read(tile, data_dir)
        rgb.append(found.channels == RGB)
        if np.issubdtype(found.pixels.dtype, np.floating):
            floats = True
        else:
            widest = max(widest, found.bits)
            brightest = max(brightest, float(found.pixels.max()))
        if found.mpp is None:
            notes["no resolution in the file: magnification is not checked"] += 1
        else:
            scales.append(found.mpp * min(found.pixels.shape[:2]) / image_size)
        notes.update(note for note in found.warnings if "--mpp" not in note)
    # Samples wider than a byte are never taken for bytes, however dark the tiles.
    needed = next(b for b in (10, 12, 14, 16, 32) if brightest < 2**b)
    return Survey(
        rgb=all(rgb),
        bits=8 if widest == 8 else min(widest, needed),
        floats=floats,
        mpp=round(float(np.median(scales)), 4) if scales else None,
        warnings=tuple(f"{count} tiles: {note}" for note, count in sorted(notes.items())),
    )


def choose_preprocess(survey: Survey, recipe: DataRecipe) -> Preprocess:
    """Fix the preprocessing by the recipe and, where that leaves it open, by the tiles."""
    channels = recipe.channels or (RGB if survey.rgb else MARKERS)
    plain = survey.bits == 8 and not survey.floats
    return Preprocess(
        channels=tuple(channels),
        image_size=recipe.image_size,
        tile_dtype="uint8" if plain else "float32",
        tile_bits=survey.bits,
        tile_mpp=survey.mpp,
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
        found = _read(tile, data_dir)
        try:
            pixels, _, _ = match_channels(found, preprocess.channels)
        except CdtError as error:
            raise DatasetError(
                f"{name}: has the channels {', '.join(found.channels)}, the recipe asks for "
                f"{', '.join(preprocess.channels)}: name those that every tile has with "
                f"data.channels=[A,B,...]"
            ) from error
        try:
            array = preprocess.tile(pixels, found.bits, name=found.source)
        except CdtError as error:
            raise DatasetError(f"{name}: {error}") from error
        if preprocess.is_blank(array):
            raise DatasetError(f"{name}: shows no tissue (every channel is flat): leave it out")
        arrays.append(array)
        hashes.append(found.sha256)
    _refuse_twins(tiles, hashes, data_dir)
    patients = sorted({tile.patient for tile in tiles})
    return TileArrays(
        tiles=torch.from_numpy(np.stack(arrays)),
        labels=np.array([classes.index(tile.label) for tile in tiles], dtype=np.int64),
        groups=np.array([patients.index(tile.patient) for tile in tiles], dtype=np.int64),
        classes=classes,
        names=tuple(_relative(tile.path, data_dir) for tile in tiles),
        sha256=tuple(hashes),
    )


def load_ct(
    dataset: TileDataset, preprocess: Preprocess, data_dir: Path, progress: Progress[int]
) -> tuple[CtArrays, tuple[str, ...]]:
    """Read and preprocess every CT series that can be used.

    Hospital exports hold scouts and dose pages beside the series, so one that can't be used is left
    out with a warning.

    Returns:
        The volumes, and one warning for each series left out.

    Raises:
        DatasetError: none can be used.
    """
    volumes, patients, hashes, warnings = [], [], [], []
    for index in progress(range(len(dataset.ct)), "reading CT"):
        series = dataset.ct[index]
        name = _relative(series.path, data_dir)
        try:
            volume = read_series(series.path, min_slices=preprocess.min_slices)
        except CdtError as error:
            warnings.append(f"{name}: left out: {error}")
            continue
        volumes.append(preprocess.ct(volume)[0])
        patients.append(series.patient)
        hashes.append(volume.series_hash)
    if not volumes:
        raise DatasetError(f"no CT series in ct_data can be used; {warnings[0]}")
    stacked = torch.from_numpy(np.stack(volumes))
    return CtArrays(stacked, tuple(patients), tuple(hashes)), tuple(warnings)


def _read(tile: LabelledTile, data_dir: Path) -> Tile:
    try:
        return read_tile(tile.path)
    except CdtError as error:
        raise DatasetError(f"{_relative(tile.path, data_dir)}: {error}") from error


def _refuse_twins(tiles: Sequence[LabelledTile], hashes: Sequence[str], data_dir: Path) -> None:
    """The same file under two patients would stand on both sides of a fold."""
    first: dict[str, LabelledTile] = {}
    for tile, digest in zip(tiles, hashes, strict=True):
        twin = first.setdefault(digest, tile)
        if twin.patient != tile.patient or twin.label != tile.label:
            raise DatasetError(
                f"{_relative(tile.path, data_dir)} and {_relative(twin.path, data_dir)} are the "
                f"same image under two patients (or groups) or labels: keep one"
            )


def _relative(path: Path, data_dir: Path) -> str:
    return path.relative_to(data_dir).as_posix()
