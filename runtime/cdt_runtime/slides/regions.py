"""Regions of one level: each segment is decoded once, in threads, and kept while it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.cores import available_cores
from cdt_runtime.errors import TileError
from cdt_runtime.slides.box import Box
from cdt_runtime.slides.dicom_wsi import DicomLevel, DicomRegions
from cdt_runtime.slides.pyramid import AnyLevel, Level
from cdt_runtime.tiff_page import Page, decode_segment, read_segment, segment_shape, segment_spans

Pixels = NDArray[Any]


class _Key(NamedTuple):
    page: int
    plane: int
    row: int
    column: int


class Regions:
    """Reads boxes of a level.

    Bytes are read by the caller's thread, in order; decoders run beside it.

    Args:
        level: whose pixels are read.
        glass: value of samples where the scanner stored nothing.
    """

    def __init__(self, level: Level, glass: int) -> None:
        self._level, self._glass = level, glass
        self._spans = [
            np.array(segment_spans(page, slide=True), dtype=np.int64) for page in level.pages
        ]
        for page in level.pages:
            page.jpeg_tables  # noqa: B018  read here: the file has one reader
        self._pool = ThreadPoolExecutor(available_cores(), "decode")
        self._cache: dict[_Key, Future[Pixels] | None] = {}

    def __enter__(self) -> Regions:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def channels(self) -> int:
        """Samples of a pixel, over all pages."""
        return sum(page.samples for page in self._level.pages)

    def want(self, box: Box) -> None:
        """Begin to decode what a box needs."""
        for key in self._keys(box):
            if key not in self._cache:
                self._cache[key] = self._started(key)

    def read(self, box: Box) -> Pixels:
        """Return the pixels of a box, `(height, width, C)`.

        Raises:
            TileError: a segment is damaged.
        """
        pixels, damaged = self.read_what_can_be(box)
        if damaged:
            raise next(iter(damaged.values()))
        return pixels

    def read_what_can_be(self, box: Box) -> tuple[Pixels, dict[Box, TileError]]:
        """Return the pixels of a box, and the damaged parts of it: those are of glass."""
        self.want(box)
        first = self._level.pages[0]
        shape = (box.height, box.width, self.channels)
        pixels, damaged = np.empty(shape, first.dtype), {}
        for key in self._keys(box):
            page = self._level.pages[key.page]
            top, left = key.row * page.segment[0], key.column * page.segment[1]
            rows, columns, samples = segment_shape(page, top, left)
            start = key.page * first.samples + key.plane
            segment = Box(top, left, rows, columns)
            into, of = _overlap(box, segment)
            part: Pixels | int = self._glass
            try:
                if (future := self._cache[key]) is not None:
                    part = future.result()[of]
            except TileError as error:
                damaged[segment] = error
            pixels[(*into, slice(start, start + samples))] = part
        return pixels, damaged

    def forget_above(self, row: int) -> None:
        """Let go of what lies wholly above a row of pixels."""
        for key in [key for key in self._cache if self._bottom(key) <= row]:
            del self._cache[key]

    def forget_all_but(self, boxes: Iterable[Box]) -> None:
        """Let go of what none of the boxes needs."""
        needed = {key for box in boxes for key in self._keys(box)}
        self._cache = {key: kept for key, kept in self._cache.items() if key in needed}

    def _bottom(self, key: _Key) -> int:
        return (key.row + 1) * self._level.pages[key.page].segment[0]

    def _keys(self, box: Box) -> Iterator[_Key]:
        for index, page in enumerate(self._level.pages):
            high, wide = page.segment
            for plane in range(page.samples if page.planar else 1):
                for row in range(box.top // high, -(-(box.top + box.height) // high)):
                    for column in range(box.left // wide, -(-(box.left + box.width) // wide)):
                        yield _Key(index, plane, row, column)

    def _started(self, key: _Key) -> Future[Pixels] | None:
        """Read the bytes of a segment and hand them to a decoder; None where there are none."""
        page = self._level.pages[key.page]
        offset, count = self._spans[key.page][_place(page, key)].tolist()
        if not offset or not count:
            return None
        top, left = key.row * page.segment[0], key.column * page.segment[1]
        data = read_segment(page, top, left, (offset, count))
        return self._pool.submit(decode_segment, page, top, left, data)


def open_regions(level: AnyLevel, glass: int) -> Regions | DicomRegions:
    """Begin to read a level; `Regions` says how."""
    return level.regions(glass) if isinstance(level, DicomLevel) else Regions(level, glass)


def _place(page: Page, key: _Key) -> int:
    """Which segment of the page it is, in file order."""
    down, across = (
        -(-page.height // page.segment[0]),
        -(-page.width // page.segment[1]),
    )
    return (key.plane * down + key.row) * across + key.column


def _overlap(box: Box, segment: Box) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a segment lies in a box, and which part of the segment that is."""
    top, left = max(box.top, segment.top), max(box.left, segment.left)
    bottom = min(box.top + box.height, segment.top + segment.height)
    right = min(box.left + box.width, segment.left + segment.width)
    into = slice(top - box.top, bottom - box.top), slice(left - box.left, right - box.left)
    of = (
        slice(top - segment.top, bottom - segment.top),
        slice(left - segment.left, right - segment.left),
    )
    return into, of
