"""A data set in memory: every tile and every CT read once, preprocessed, as tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_runtime.encoders import Encoders
from cdt_runtime.errors import CdtError, DatasetError, TileError
from cdt_runtime.markers import MARKERS
from cdt_runtime.preprocess import Preprocess, area_resize
from cdt_runtime.reading import read_series, read_tile
from cdt_runtime.tile import Tile, match_channels
from cdt_runtime.volume import Volume
from cdt_train.config import DataRecipe
from cdt_train.data.dataset import CtSeries, LabelledTile, TileDataset, name_below, tile_name
from cdt_train.data.npz import pixels_hash
from cdt_train.data.npz_volume import read_npz_volume

T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]
RGB = ("R", "G", "B")
GRAY = ("gray",)

FINE_MM = 2.0
"""Edge of a voxel of `CtArrays.fine`."""

FINE_VOXELS = 200
"""Most voxels of it on an axis: the middle 40 cm."""

HU_RANGE = (-1024, 3071)


@dataclass(frozen=True, eq=False)
class TileArrays:
    """Preprocessed tiles.

    Attributes:
        tiles: `(n, M, S, S)`, uint8 or float32.
        labels: `(n,)` int64, index into `classes`.
        groups: `(n,)` int64; tiles of one patient (or group) share a number.
        classes: class names.
        names: path of each tile relative to the data folder; of tiles in one file, their place.
        sha256: hash of each tile's file, or pixels.
        split: where the data set puts each: "train", "val", "test" or a fold's number; None where
            it does not say.
        features: by foundation encoder `(n, X, W)` float32.
    """

    tiles: Tensor
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    split: tuple[str, ...] | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, chosen: NDArray[np.int64]) -> TileArrays:
        """Return the chosen tiles, in that order."""
        return replace(
            self,
            tiles=self.tiles[torch.from_numpy(chosen)],
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            names=tuple(self.names[i] for i in chosen),
            sha256=tuple(self.sha256[i] for i in chosen),
            split=None if self.split is None else tuple(self.split[i] for i in chosen),
            features=_taken(self.features, torch.from_numpy(chosen)),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class CtArrays:
    """Preprocessed volumes; there may be none.

    Attributes:
        volumes: `(n, W, D, S, S)` float32.
        patients: patient of each.
        sha256: hash of each series.
        fine: HU of each, int16 `(D, H, W)` of its own size in voxels of 2 mm: its middle, at most
            200 voxels on an axis.
        features: by foundation encoder `(n, X, W)` float32.
    """

    volumes: Tensor
    patients: tuple[str, ...]
    sha256: tuple[str, ...]
    fine: tuple[Tensor, ...]
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def without(self, patients: Iterable[str]) -> CtArrays:
        """Return the volumes of all other patients."""
        out = set(patients)
        return self.take([i for i, patient in enumerate(self.patients) if patient not in out])

    def take(self, chosen: Sequence[int]) -> CtArrays:
        """Return the chosen volumes, in that order."""
        places = torch.tensor(chosen, dtype=torch.int64)
        return CtArrays(
            self.volumes[places],
            tuple(self.patients[i] for i in chosen),
            tuple(self.sha256[i] for i in chosen),
            tuple(self.fine[i] for i in chosen),
            _taken(self.features, places),
        )

    def __len__(self) -> int:
        return len(self.patients)


@dataclass(frozen=True)
class Survey:
    """What the tiles of a data set are like, before any is kept.

    Attributes:
        rgb: whether all are RGB.
        gray: whether all are gray.
        bits: significant bits that their samples need, by the brightest of all; 8 for bytes.
        floats: whether any has floating-point samples.
        shapes: height and width of each kind of tile, ascending.
        mpp: median microns a pixel of the tile input, or None where no tile says.
        warnings: what their reader had to say, each once, with the number of tiles.
    """

    rgb: bool
    gray: bool
    bits: int
    floats: bool
    shapes: tuple[tuple[int, int], ...]
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
    brightest, widest, floats, kinds, shapes = 0.0, 8, False, set(), set()
    scales, notes = [], Counter[str]()
    for tile in progress(tiles, "surveying tiles"):
        found = _read(tile, data_dir)
        kinds.add(found.channels)
        shapes.add((found.pixels.shape[0], found.pixels.shape[1]))
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
        rgb=kinds == {RGB},
        gray=kinds == {GRAY},
        bits=8 if widest == 8 else min(widest, needed),
        floats=floats,
        shapes=tuple(sorted(shapes)),
        mpp=round(float(np.median(scales)), 4) if scales else None,
        warnings=tuple(f"{count} tiles: {note}" for note, count in sorted(notes.items())),
    )


def choose_preprocess(survey: Survey, recipe: DataRecipe) -> Preprocess:
    """Fix the preprocessing by the recipe and, where that leaves it open, by the tiles."""
    own = RGB if survey.rgb else GRAY if survey.gray else MARKERS
    channels = recipe.channels or own
    plain = survey.bits == 8 and not survey.floats
    return Preprocess(
        channels=tuple(channels),
        image_size=recipe.image_size,
        tile_dtype="uint8" if plain else "float32",
        tile_bits=survey.bits,
        tile_mpp=survey.mpp,
        fill_missing=recipe.channel_dropout > 0 and tuple(channels) not in (RGB, GRAY),
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
    *,
    keep_blank: bool = False,
    encoders: Encoders | None = None,
) -> TileArrays:
    """Read and preprocess tiles.

    Args:
        tiles: of one data set.
        classes: its classes.
        preprocess: as `choose_preprocess` gave it.
        data_dir: that the tiles are named below.
        progress: shows a bar.
        keep_blank: take tiles that show no tissue, on which a deployed classifier abstains.
        encoders: foundation encoders that look at each tile, too.

    Raises:
        DatasetError: a tile can't be used, or shows no tissue; the line names it.
    """
    stacked = np.empty((len(tiles), *preprocess.tile_shape), dtype=preprocess.tile_dtype)
    hashes, said = [], []
    for tile, slot in zip(progress(tiles, "reading tiles"), stacked, strict=True):
        found = _read(tile, data_dir)
        name = tile_name(tile, data_dir)
        slot[:] = _tile_input(found, preprocess, name)
        if not keep_blank and preprocess.is_blank(slot):
            raise DatasetError(f"{name}: shows no tissue (every channel is flat): leave it out")
        hashes.append(found.sha256)
        said.append(_said_of(found, encoders, name))
    _refuse_twins(tiles, hashes, data_dir)
    of_class = {name: number for number, name in enumerate(classes)}
    of_patient = {name: i for i, name in enumerate(sorted({tile.patient for tile in tiles}))}
    splits = [tile.split for tile in tiles if tile.split is not None]
    return TileArrays(
        tiles=torch.from_numpy(stacked),
        labels=np.array([of_class[tile.label] for tile in tiles], dtype=np.int64),
        groups=np.array([of_patient[tile.patient] for tile in tiles], dtype=np.int64),
        classes=classes,
        names=tuple(tile_name(tile, data_dir) for tile in tiles),
        sha256=tuple(hashes),
        split=tuple(splits) if len(splits) == len(tiles) else None,
        features=_stacked(said),
    )


def _said_of(tile: Tile, encoders: Encoders | None, name: str) -> dict[str, NDArray[np.float32]]:
    """What foundation encoders say of a tile."""
    if encoders is None or not encoders.see_tiles:
        return {}
    try:
        return encoders.of_tile(
            tile.sha256, lambda: encoders.images(tile.pixels, tile.bits, tile.channels, name)
        )
    except TileError as error:
        raise DatasetError(str(error)) from error


def _stacked(said: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, Tensor]:
    keys = said[0] if said else {}
    return {key: torch.from_numpy(np.stack([one[key] for one in said])) for key in keys}


def _taken(features: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    return {key: values[places] for key, values in features.items()}


def _tile_input(found: Tile, preprocess: Preprocess, name: str) -> NDArray[Any]:
    try:
        pixels, _, _ = match_channels(found, preprocess.channels)
    except CdtError as error:
        raise DatasetError(
            f"{name}: has the channels {', '.join(found.channels)}, the recipe asks for "
            f"{', '.join(preprocess.channels)}: name those that every tile has with "
            f"data.channels=[A,B,...]"
        ) from error
    try:
        return preprocess.tile(pixels, found.bits, name=found.source)
    except CdtError as error:
        raise DatasetError(f"{name}: {error}") from error


def load_ct(
    dataset: TileDataset,
    preprocess: Preprocess,
    data_dir: Path,
    progress: Progress[int],
    encoders: Encoders | None = None,
) -> tuple[CtArrays, tuple[str, ...]]:
    """Read and preprocess every CT series that can be used.

    Hospital exports hold scouts and dose pages beside the series, so one that can't be used is left
    out with a warning. A data set without any CT gives no volumes.

    Returns:
        The volumes, and one warning for each series left out or doubtful.

    Raises:
        DatasetError: there are series, and none can be used.
    """
    volumes, fine, patients, hashes, warnings, said = [], [], [], [], [], []
    for index in progress(range(len(dataset.ct)), "reading CT"):
        series = dataset.ct[index]
        name = series.name or name_below(series.path, data_dir)
        try:
            volume = _read_volume(series, preprocess.min_slices)
            small = preprocess.ct(volume)[0]
        except CdtError as error:
            reason = str(error).removeprefix(f"{series.path}: ")
            warnings.append(f"{name}: left out: {reason}")
            continue
        if series.path.suffix == ".npz":
            warnings += [f"{name}: {note}" for note in volume.warnings]
        volumes.append(torch.from_numpy(small))
        fine.append(fine_volume(volume))
        patients.append(series.patient)
        hashes.append(volume.series_hash)
        said.append(_said_of_ct(volume, encoders))
    if dataset.ct and not volumes:
        raise DatasetError(f"no CT series can be used; {warnings[0]}")
    stacked = torch.stack(volumes) if volumes else torch.empty((0, *preprocess.ct_shape[1:]))
    arrays = CtArrays(stacked, tuple(patients), tuple(hashes), tuple(fine), _stacked(said))
    return arrays, tuple(warnings)


def _said_of_ct(volume: Volume, encoders: Encoders | None) -> dict[str, NDArray[np.float32]]:
    return encoders.of_volume(volume.series_hash, lambda: volume) if encoders else {}


def fine_volume(volume: Volume) -> Tensor:
    """Resample the middle of a volume to voxels of 2 mm.

    By the same box means (linear where it grows) as the model's own input.

    Returns:
        `(D, H, W)` int16 HU, -1024 to 3071, at most 200 voxels on an axis. A length is rounded to
        whole voxels, so that spacing is 2 mm to within half a voxel over the whole axis.
    """
    extent = FINE_MM * FINE_VOXELS
    middle, shape = [], []
    for length, spacing in zip(volume.hu.shape, volume.spacing_mm, strict=True):
        kept = min(length, round(extent / spacing))
        first = (length - kept) // 2
        middle.append(slice(first, first + kept))
        shape.append(min(FINE_VOXELS, max(1, round(kept * spacing / FINE_MM))))
    hu = area_resize(volume.hu[tuple(middle)], tuple(shape))
    return torch.from_numpy(np.rint(np.clip(hu, *HU_RANGE)).astype(np.int16))


def _read_volume(series: CtSeries, min_slices: int) -> Volume:
    if series.path.suffix == ".npz":
        return read_npz_volume(series.path, min_slices)
    return read_series(series.path, min_slices=min_slices)


def _read(tile: LabelledTile, data_dir: Path) -> Tile:
    name = tile_name(tile, data_dir)
    if tile.pixels is not None:
        return _from_pixels(tile.pixels, name)
    try:
        return read_tile(tile.path)
    except CdtError as error:
        raise DatasetError(f"{name}: {error}") from error


def _from_pixels(pixels: NDArray[Any], name: str) -> Tile:
    """A tile as its file would have been read.

    Raises:
        DatasetError: it is a cube of a volume.
    """
    if pixels.ndim != 3:
        raise DatasetError(
            f"{name}: is a volume of {' x '.join(map(str, pixels.shape[:-1]))} voxels, and the "
            "few-shot classifier takes 2D tiles: train a supervised 3D model on it"
        )
    return Tile(
        pixels=pixels,
        channels=RGB if pixels.shape[-1] == 3 else GRAY,
        bits=8 * pixels.dtype.itemsize,
        mpp=None,
        sha256=pixels_hash(pixels),
        source=name,
    )


def _refuse_twins(tiles: Sequence[LabelledTile], hashes: Sequence[str], data_dir: Path) -> None:
    """The same file under two patients would stand on both sides of a fold."""
    first: dict[str, LabelledTile] = {}
    for tile, digest in zip(tiles, hashes, strict=True):
        twin = first.setdefault(digest, tile)
        if (twin.patient, twin.label, twin.split) != (tile.patient, tile.label, tile.split):
            raise DatasetError(
                f"{tile_name(tile, data_dir)} and {tile_name(twin, data_dir)} are the same image "
                f"under two patients (or groups), labels or folds: keep one"
            )
