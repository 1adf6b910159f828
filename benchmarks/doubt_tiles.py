"""Tiles that a model of lung H&E should not be asked about."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Tile = NDArray[np.uint8]
COUNT, SIDE = 150, 224
LUNG, SOFT = (-1000, 1000), (-160, 240)


def foreign(tiles: Sequence[Tile], data: Path) -> dict[str, list[Tile]]:
    """Make foreign input, some of it from tiles.

    Args:
        tiles: `(S, S, 3)` that the model should know.
        data: folder with ct/, mif/ and pathology/.
    """
    rng = np.random.default_rng(0)
    some = [tiles[place] for place in rng.permutation(len(tiles))[:COUNT]]
    shape = some[0].shape
    return {
        "blank": [
            np.clip(rng.normal(v, 3, shape), 0, 255).astype(np.uint8) for v in range(200, 250)
        ],
        "noise": [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(COUNT)],
        "noise with a tile's mean and spread": [_noise_like(one, rng) for one in some],
        "inverted": [255 - one for one in some],
        "CT slices": _ct(data / "ct", rng),
        "breast multiplex, three channels as RGB": _multiplex(data / "mif", rng),
        "cardiac H&E": _cardiac(data / "mif", rng),
        "gray": [np.asarray(Image.fromarray(one).convert("L").convert("RGB")) for one in some],
        "red and blue swapped": [np.ascontiguousarray(one[:, :, ::-1]) for one in some],
        "blurred, sigma 2": [
            np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(2))) for one in some
        ],
        "JPEG at quality 5": [_squeezed(one) for one in some],
    }


def _noise_like(tile: Tile, rng: np.random.Generator) -> Tile:
    flat = tile.reshape(-1, 3)
    noise = rng.normal(flat.mean(axis=0), flat.std(axis=0), tile.shape)
    return np.clip(noise, 0, 255).astype(np.uint8)


def _ct(folder: Path, rng: np.random.Generator) -> list[Tile]:
    found = []
    for path in sorted(folder.glob("*.npz")):
        hu = np.load(path)["hu"].astype(np.float32)
        for low, high in (LUNG, SOFT):
            gray = np.clip(255 * (hu[5:-5] - low) / (high - low), 0, 255).astype(np.uint8)
            found += [np.repeat(slice_[:, :, None], 3, axis=2) for slice_ in gray]
    return [found[place] for place in rng.permutation(len(found))[:COUNT]]


def _multiplex(folder: Path, rng: np.random.Generator) -> list[Tile]:
    found = []
    for path in sorted(folder.glob("*.ome.tif")):
        planes: NDArray[Any] = tifffile.imread(path)
        for _ in range(COUNT // 2):
            chosen = planes[rng.permutation(len(planes))[:3]]
            found.append(_crop(np.moveaxis(chosen, 0, -1), rng))
    return found


def _cardiac(folder: Path, rng: np.random.Generator) -> list[Tile]:
    return [
        _crop(tifffile.imread(path)[:, :, :3], rng)
        for path in sorted(folder.glob("cardiac*"))
        for _ in range(40)
    ]


def _crop(picture: NDArray[Any], rng: np.random.Generator) -> Tile:
    top, left = (int(rng.integers(0, size - SIDE)) for size in picture.shape[:2])
    return np.ascontiguousarray(picture[top : top + SIDE, left : left + SIDE], np.uint8)


def _squeezed(tile: Tile) -> Tile:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=5)
    return np.asarray(Image.open(file))
