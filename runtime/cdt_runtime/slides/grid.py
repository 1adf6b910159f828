"""Which tiles a slide is cut into, and in what order they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import TileError
from cdt_runtime.preprocess import area_resize
from cdt_runtime.slides.box import Box
from cdt_runtime.slides.tissue import Mask, Small

if TYPE_CHECKING:
    from cdt_runtime.reading import SlideLevel

STRIP = 16
"""Columns of tiles that are read side by side: what is decoded at a time is no wider."""

LEAST_TISSUE = 0.2
"""Share of a tile that must be tissue."""


@dataclass(frozen=True)
class Grid:
    """Square tiles side by side; what is left over at the right and lower edge is not looked at.

    Attributes:
        level: that tiles are read from.
        side: pixels of the level along a tile, not always whole.
        rows: of tiles.
        columns: of tiles.
    """

    level: SlideLevel
    side: float
    rows: int
    columns: int

    def box(self, row: int, column: int) -> Box:
        """Return the pixels of the level that a tile covers."""
        return tile_box(self.side, row, column)

    @property
    def full_side(self) -> float:
        """Pixels of the full size along a tile."""
        return self.side * self.level.downsample


def tile_box(side: float, row: int, column: int) -> Box:
    """Return the pixels that a tile covers, of tiles of `side` pixels."""
    top, bottom = round(row * side), round((row + 1) * side)
    left, right = round(column * side), round((column + 1) * side)
    return Box(top, left, bottom - top, right - left)


def grid_of(level: SlideLevel, level_mpp: float, tile_microns: float) -> Grid:
    """Lay the grid over a level.

    Args:
        level: that tiles are read from.
        level_mpp: microns a pixel of that level.
        tile_microns: what a tile shows, along its side.

    Raises:
        TileError: the slide is smaller than one tile.
    """
    side = tile_microns / level_mpp
    rows, columns = int(level.height / side + 1e-6), int(level.width / side + 1e-6)
    if rows == 0 or columns == 0:
        size = f"{level.width * level_mpp:.0f} x {level.height * level_mpp:.0f} microns"
        raise TileError(
            f"shows {size}, a tile {tile_microns:.0f}: classify it as a tile, without --slide"
        )
    return Grid(level, side, rows, columns)


def tissue_shares(grid: Grid, mask: Mask, small: Small) -> NDArray[np.float32]:
    """Tell how much of each tile is tissue: `(rows, columns)`, 0 to 1."""
    height = round(grid.rows * grid.full_side / small.scale[0])
    width = round(grid.columns * grid.full_side / small.scale[1])
    covered = mask[: max(1, height), : max(1, width)].astype(np.float32)
    return area_resize(covered, (grid.rows, grid.columns))


def reading_order(shares: NDArray[np.float32]) -> NDArray[np.int64]:
    """Order the tiles that show tissue: in strips of some columns, each from top to bottom.

    Returns:
        `(n, 2)` row and column.
    """
    places = np.argwhere(shares >= LEAST_TISSUE)
    order = np.lexsort((places[:, 1], places[:, 0], places[:, 1] // STRIP))
    result: NDArray[np.int64] = places[order]
    return result
