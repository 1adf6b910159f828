"""Where on a slide there is tissue, found on a small copy of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.preprocess import area_resize
from cdt_runtime.slides.pyramid import Level, Pyramid
from cdt_runtime.slides.regions import Box, Regions
from cdt_runtime.tile import RGB

Mask = NDArray[np.bool_]
Float = NDArray[np.float32]

SIDE = 2048
"""Most pixels of the small copy's longer side."""

BLOCK = 8
"""Rows of the small copy that are read at a time."""

DENSITY_RANGE = (0.05, 0.20)
"""The threshold on mean optical density stays within: glass lies below, pale stroma above."""

INK = (0.16, 0.06)
"""Darker than the first and less coloured than the second, as shares of full scale: pen, or the
border that some scanners leave black."""

LEVELS = 256
"""Bins of the histogram that is parted."""


@dataclass(frozen=True, eq=False)
class Small:
    """A small copy of a slide.

    Attributes:
        pixels: `(h, w, C)` float32, 0 to 1 of the samples' range.
        scale: pixels of the full size a pixel, down and across.
        damaged: `(h, w)`, what could not be read and is shown as glass.
    """

    pixels: Float
    scale: tuple[float, float]
    damaged: Mask


def small_copy(pyramid: Pyramid, glass: int, side: int = SIDE) -> Small:
    """Reduce the coarsest level that is not smaller than the copy, a block of rows at a time.

    Args:
        pyramid: an open slide.
        glass: value of samples where nothing is stored.
        side: most pixels of the copy's longer side.
    """
    finest = pyramid.levels[0]
    level = next(
        (one for one in reversed(pyramid.levels) if max(one.height, one.width) >= side), finest
    )
    factor = max(1.0, max(level.height, level.width) / side)
    height, width = max(1, round(level.height / factor)), max(1, round(level.width / factor))
    pixels = np.empty((height, width, len(pyramid.channels)), np.float32)
    damaged = np.zeros((height, width), bool)
    with Regions(level, glass) as regions:
        for start in range(0, height, BLOCK):
            stop = min(start + BLOCK, height)
            first, last = (round(edge * level.height / height) for edge in (start, stop))
            _reduce_rows(regions, level, (first, last), pixels[start:stop], damaged)
            regions.forget_above(last)
    pixels /= _top(level, pyramid.bits)
    return Small(pixels, (finest.height / height, finest.width / width), damaged)


def tissue_mask(small: Small, channels: tuple[str, ...]) -> Mask:
    """Tell tissue from glass.

    Args:
        small: the copy.
        channels: names; RGB is judged by how much light the stain takes, markers by how much they
            shine.

    Returns:
        `(h, w)` bool. Damaged parts count as tissue, so that they are not passed over in silence.

    Source: Otsu 1979 for the threshold, on optical density after Beer and Lambert.
    """
    if channels == RGB:
        density = -np.log10(np.maximum(small.pixels, 1 / 255)).mean(axis=2)
        dark, coloured = small.pixels.max(axis=2), np.ptp(small.pixels, axis=2)
        ink = (dark < INK[0]) & (coloured < INK[1])
        found = (density > np.clip(otsu(density[~ink]), *DENSITY_RANGE)) & ~ink
    else:
        shining = np.sqrt(small.pixels).mean(axis=2)
        found = shining > max(otsu(shining), 1 / LEVELS)
    return _smoothed(found) | small.damaged


def otsu(values: NDArray[Any]) -> float:
    """Return the threshold that parts a histogram into two of least spread.

    Args:
        values: any shape; where all are the same there is nothing above the threshold. Between two
            heaps with nothing between them it lies in the middle.
    """
    if values.size == 0:
        return 0.0
    counts, edges = np.histogram(values, bins=LEVELS)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        between = np.nan_to_num(below * above * gap**2)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[int(best.mean()) + 1])


def _reduce_rows(
    regions: Regions, level: Level, rows: tuple[int, int], into: Float, damaged: Mask
) -> None:
    """Average whole rows down to `into`, a part of their width at a time; mark what is damaged."""
    height, width = into.shape[:2]
    step = max(1, 4096 * width // level.width)
    for start in range(0, width, step):
        stop = min(start + step, width)
        left, right = (round(edge * level.width / width) for edge in (start, stop))
        box = Box(rows[0], left, rows[1] - rows[0], right - left)
        pixels, lost = regions.read_what_can_be(box)
        into[:, start:stop] = area_resize(pixels, (height, stop - start, pixels.shape[2]))
        for segment in lost:
            _mark(damaged, segment, level)


def _mark(damaged: Mask, segment: Box, level: Level) -> None:
    """Mark the pixels of a small copy that a segment of the level has any share in."""
    down, across = damaged.shape[0] / level.height, damaged.shape[1] / level.width
    bottom, right = segment.top + segment.height, segment.left + segment.width
    damaged[
        int(segment.top * down) : math.ceil(bottom * down),
        int(segment.left * across) : math.ceil(right * across),
    ] = True


def _top(level: Level, bits: int) -> float:
    return 1.0 if level.pages[0].dtype.kind == "f" else float(2**bits - 1)


def _smoothed(mask: Mask) -> Mask:
    """A pixel is what most of its 3 x 3 neighbours are: specks go, holes close."""
    padded = np.pad(mask, 1, mode="edge").astype(np.int8)
    height, width = mask.shape
    votes = sum(
        padded[down : down + height, across : across + width]
        for down in range(3)
        for across in range(3)
    )
    result: Mask = np.asarray(votes) > 4
    return result
