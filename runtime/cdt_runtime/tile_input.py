"""One tile, from whatever a caller has, to what the graph takes in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.adaptation import Adaptation
from cdt_runtime.encoders import Encoders
from cdt_runtime.errors import TileError
from cdt_runtime.prediction import TileInput
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.reading import read_tile
from cdt_runtime.tile import Tile, match_channels
from cdt_runtime.tile_statistics import tile_statistics

if TYPE_CHECKING:
    from cdt_runtime.tiff_meta import Z

TileLike = str | os.PathLike[str] | Tile | NDArray[Any]
"""A path, a `Tile`, or an array `(H, W, M)` with the channels in the bundle's order."""

ARRAY_BITS = {"uint8": 8, "uint16": 16, "int16": 15, "uint32": 32, "float32": 32, "float64": 32}
"""Significant bits of the samples of an array; floats are fractions."""


def prepare(
    tile: TileLike,
    preprocess: Preprocess,
    *,
    channels: Sequence[str] | None = None,
    mpp: float | None = None,
    z: Z = None,
    fill_missing: bool = False,
    encoders: Encoders | None = None,
    adaptation: Adaptation | None = None,
) -> TileInput:
    """Read one tile and bring it to the tile input.

    Args:
        tile: a path, a `Tile` or an array.
        preprocess: of the model.
        channels: names for the channels of a file that has none.
        mpp: microns a pixel, where the file does not say or is wrong.
        z: which plane of a stack, as `read_tile` takes it.
        fill_missing: fill a channel that the file lacks with zeros.
        encoders: foundation encoders that look at it, too, as it is.
        adaptation: to the stain of training; a blank tile stays as it is.

    Raises:
        TileError: the tile can't be used.
    """
    started = perf_counter()
    if fill_missing:
        require_filling(preprocess)
    if isinstance(tile, np.ndarray):
        found = _from_array(tile, preprocess)
    elif isinstance(tile, Tile):
        found = tile
    else:
        found = read_tile(tile, channels=channels, mpp=mpp, z=z)
    pixels, mapping, filled = match_channels(found, preprocess.channels, fill_missing=fill_missing)
    array = preprocess.tile(pixels, found.bits, name=found.source)
    blank = preprocess.is_blank(array)
    if adaptation is not None and not blank:
        array = adaptation(array)
    images = {}
    if encoders is not None and encoders.see_tiles:
        images = encoders.images(pixels, found.bits, preprocess.channels, found.source)
    notes = [preprocess.crop_warning(found), preprocess.scale_warning(found)]
    if filled:
        notes.append(f"channels filled with zeros: {', '.join(filled)}")
    return TileInput(
        array,
        found.source,
        found.sha256,
        blank,
        mapping,
        (*found.warnings, *(note for note in notes if note)),
        (perf_counter() - started) * 1000.0,
        tile_statistics(array),
        images,
    )


def require_filling(preprocess: Preprocess) -> None:
    """Make sure that a model may be given channels of zeros.

    Raises:
        TileError: it was trained with every channel present.
    """
    if not preprocess.fill_missing:
        raise TileError(
            "--fill-missing: this model was trained with every channel present: "
            "train with data.channel_dropout above 0, or give tiles with all channels"
        )


def _from_array(pixels: NDArray[Any], preprocess: Preprocess) -> Tile:
    expected = preprocess.channels
    if pixels.ndim != 3 or pixels.shape[2] != len(expected) or 0 in pixels.shape:
        raise TileError(
            f"array of shape {pixels.shape}: expected (H, W, {len(expected)}) with channels "
            f"{', '.join(expected)}"
        )
    if str(pixels.dtype) not in ARRAY_BITS:
        raise TileError(
            f"array of {pixels.dtype}: expected one of {', '.join(ARRAY_BITS)}: convert it"
        )
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return Tile(pixels, expected, ARRAY_BITS[str(pixels.dtype)], None, digest, "array")
