"""Where on a slide there is tissue, found on a small copy of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.slides.box import Box
from cdt_runtime.slides.dicom_wsi import DicomRegions, DicomSlide
from cdt_runtime.slides.pyramid import AnyLevel, Pyramid
from cdt_runtime.slides.regions import Regions, open_regions
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


def small_copy(pyramid: Pyramid | DicomSlide, glass: int, side: int = SIDE) -> Small:
    """Average blocks of whole pixels of the coarsest level that is not smaller than the copy.

    Args:
        pyramid: an open slide.
        glass: value of samples where nothing is stored.
        side: most pixels of the copy's longer side.
    """
    levels: Sequence[AnyLevel] = pyramid.levels
    finest = levels[0]
    level = next((one for one in reversed(levels) if max(one.height, one.width) >= side), finest)
    factor = math.ceil(max(level.height, level.width) / side)
    height, width = math.ceil(level.height / factor), math.ceil(level.width / factor)
    pixels = np.empty((height, width, len(pyramid.channels)), np.float32)
    damaged = np.zeros((height, width), bool)
    with open_regions(level, glass) as regions:
        for start in range(0, height, BLOCK):
            rows = slice(start, min(start + BLOCK, height))
            _reduce_rows(regions, level, factor, rows, pixels, damaged)
            regions.forget_above(rows.stop * factor)
    pixels /= _top(level, pyramid.bits)
    scale = factor * finest.height / level.height, factor * finest.width / level.width
    return Small(pixels, scale, damaged)


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
    planes = np.ascontiguousarray(small.pixels.transpose(2, 0, 1))
    if channels == RGB:
        density = -np.log10(np.maximum(planes, 1 / 255)).mean(axis=0)
        dark = planes.max(axis=0)
        coloured = dark - planes.min(axis=0)
        ink = (dark < INK[0]) & (coloured < INK[1])
        found = (density > np.clip(otsu(density[~ink]), *DENSITY_RANGE)) & ~ink
    else:
        shining = np.sqrt(planes).mean(axis=0)
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
    regions: Regions | DicomRegions,
    level: AnyLevel,
    factor: int,
    rows: slice,
    into: Float,
    damaged: Mask,
) -> None:
    """Average blocks of `factor` pixels, some rows of them, a part of the width at a time."""
    top, bottom = rows.start * factor, min(rows.stop * factor, level.height)
    step = max(1, 4096 // factor)
    for start in range(0, into.shape[1], step):
        columns = slice(start, min(start + step, into.shape[1]))
        left, right = columns.start * factor, min(columns.stop * factor, level.width)
        box = Box(top, left, bottom - top, right - left)
        pixels, lost = regions.read_what_can_be(box)
        into[rows, columns] = block_means(pixels, factor)
        for segment in lost:
            _mark(damaged, segment, factor)


def block_means(pixels: NDArray[Any], factor: int) -> Float:
    """Average blocks of `factor` x `factor` pixels of `(h, w, C)`; those at an end may be smaller.

    Returns:
        `(ceil(h / factor), ceil(w / factor), C)` float32.
    """
    kind = np.float64 if pixels.dtype.kind == "f" else np.int64 if pixels.itemsize > 2 else np.int32
    sums = _strided_sum(_strided_sum(pixels, factor, kind).swapaxes(0, 1), factor, kind)
    down, across = (
        np.minimum(factor, size - np.arange(0, size, factor)) for size in pixels.shape[:2]
    )
    return np.asarray(sums.swapaxes(0, 1) / np.outer(down, across)[:, :, None], np.float32)


def _strided_sum(pixels: NDArray[Any], factor: int, kind: type) -> NDArray[Any]:
    """Add each `factor` rows up: whole strided slices at a time, which is what numpy does fast."""
    total = np.zeros((-(-len(pixels) // factor), *pixels.shape[1:]), kind)
    for start in range(factor):
        part = pixels[start::factor]
        total[: len(part)] += part
    return total


def _mark(damaged: Mask, segment: Box, factor: int) -> None:
    """Mark the pixels of a small copy that a segment of the level has any share in."""
    bottom, right = segment.top + segment.height, segment.left + segment.width
    rows = slice(segment.top // factor, math.ceil(bottom / factor))
    damaged[rows, segment.left // factor : math.ceil(right / factor)] = True


def _top(level: AnyLevel, bits: int) -> float:
    return 1.0 if level.dtype.kind == "f" else float(2**bits - 1)


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
