"""Tiles of a slide as a stream of batches, each segment decoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.adaptation import Adaptation
from cdt_runtime.encoders import Encoders
from cdt_runtime.errors import TileError
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.reading import Slide
from cdt_runtime.slides.grid import Grid
from cdt_runtime.tile_statistics import tile_statistics

Float = NDArray[np.float32]
Places = NDArray[np.int64]
Place = tuple[int, int]
_Read = tuple[Place, NDArray[Any], Float, dict[str, NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles, ready for the graph.

    Attributes:
        places: row and column of each tile that could be read.
        tiles: `(B, M, S, S)`, `B` being the number of places; none where B is 0.
        failures: row, column and reason of each tile that could not.
        statistics: `tile_statistics` of each, `(F,)`.
        images: the tiles as each foundation encoder takes them, by encoder `(B, ...)`.
    """

    places: tuple[Place, ...]
    tiles: NDArray[Any] | None
    failures: tuple[tuple[Place, str], ...]
    statistics: tuple[Float, ...] = ()
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How samples of a slide become a tile input.

    Attributes:
        order: for each channel of the model the slide's, or None for one of zeros.
        bits: significant bits of an integer sample.
        glass: value of samples where nothing is stored.
        name: of the slide, for errors.
    """

    order: tuple[int | None, ...]
    bits: int
    glass: int
    name: str


def tile_batches(
    slide: Slide,
    grid: Grid,
    places: Places,
    preprocess: Preprocess,
    reading: Reading,
    size: int,
    encoders: Encoders | None = None,
    adaptation: Adaptation | None = None,
) -> Iterator[Batch]:
    """Read tiles in the order given, `size` of them a batch.

    Args:
        slide: open.
        grid: of the slide.
        places: `(n, 2)` row and column, in reading order.
        preprocess: of the model.
        reading: of the slide.
        size: tiles of a batch.
        encoders: foundation encoders that look at them, too, as they are.
        adaptation: to the stain of training.

    Raises:
        TileError: the slide can't be read further.
    """
    waiting = iter(places.tolist())
    for read in slide.tiles(grid.level, grid.side, places, reading.glass, size):
        found: list[_Read] = []
        failed: list[tuple[Place, str]] = []
        for pixels, (row, column) in zip(read, waiting, strict=False):
            place = (row, column)
            try:
                if isinstance(pixels, str):
                    raise TileError(pixels)
                pixels = _in_order(pixels, reading.order)
                found.append(_prepared(place, pixels, preprocess, reading, encoders, adaptation))
            except TileError as error:
                failed.append((place, str(error)))
        yield _batch(found, failed)


def _prepared(
    place: Place,
    pixels: NDArray[Any],
    preprocess: Preprocess,
    reading: Reading,
    encoders: Encoders | None,
    adaptation: Adaptation | None,
) -> _Read:
    tile = preprocess.tile(pixels, reading.bits, name=reading.name)
    if adaptation is not None and not preprocess.is_blank(tile):
        tile = adaptation(tile)
    images = {}
    if encoders is not None and encoders.see_tiles:
        images = encoders.images(pixels, reading.bits, preprocess.channels, reading.name)
    return place, tile, tile_statistics(tile), images


def _batch(found: list[_Read], failed: list[tuple[Place, str]]) -> Batch:
    if not found:
        return Batch((), None, tuple(failed))
    places, tiles, statistics, seen = zip(*found, strict=True)
    images = {key: np.stack([one[key] for one in seen]) for key in seen[0]}
    return Batch(places, np.stack(tiles), tuple(failed), statistics, images)


def _in_order(pixels: NDArray[Any], order: Sequence[int | None]) -> NDArray[Any]:
    if list(order) == list(range(pixels.shape[2])):
        return pixels
    chosen = np.zeros((*pixels.shape[:2], len(order)), pixels.dtype)
    for at, place in enumerate(order):
        if place is not None:
            chosen[:, :, at] = pixels[:, :, place]
    return chosen
