"""The tiles of a grid, cut from a level while the next ones are decoded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.slides.box import Box
from cdt_runtime.slides.dicom_wsi import DicomRegions
from cdt_runtime.slides.grid import STRIP, tile_box
from cdt_runtime.slides.regions import Regions

Places = NDArray[np.int64]
Place = tuple[int, int]


def tiles_ahead(regions: Regions | DicomRegions, side: float, places: Places) -> Iterator[Box]:
    """Give the boxes of tiles one by one; what the next row of tiles needs is decoded meanwhile.

    Args:
        regions: of the level.
        side: pixels of the level along a tile, not always whole.
        places: `(n, 2)` row and column, in reading order.
    """
    rows = _rows(places)
    for at, row in enumerate(rows):
        begins = at == 0 or row[0][1] // STRIP != rows[at - 1][0][1] // STRIP
        if begins:
            regions.forget_all_but(tile_box(side, *place) for place in row)
        regions.forget_above(tile_box(side, *row[0]).top)
        for place in [*row, *(rows[at + 1] if at + 1 < len(rows) else ())]:
            regions.want(tile_box(side, *place))
        yield from (tile_box(side, *place) for place in row)


def _rows(places: Places) -> list[list[Place]]:
    """Part the places where the row or the strip of columns changes."""
    if not len(places):
        return []
    keys = np.stack([places[:, 0], places[:, 1] // STRIP], axis=1)
    cuts = np.flatnonzero((np.diff(keys, axis=0) != 0).any(axis=1)) + 1
    parts = np.split(places, cuts)
    return [[(int(row), int(column)) for row, column in part] for part in parts]
