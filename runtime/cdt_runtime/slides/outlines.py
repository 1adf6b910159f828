"""Outlines of the areas that tiles of one class form."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int16]
Corner = tuple[int, int]
Ring = list[Corner]

_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""Right, down, left, up, as (down, across)."""


@dataclass(frozen=True, eq=False)
class Area:
    """Tiles of one class that share edges.

    Attributes:
        label: index of the class.
        cells: `(n, 2)` row and column.
        rings: corners as (row, column), the outer ring first, then holes; each is closed.
    """

    label: int
    cells: NDArray[np.int64]
    rings: list[Ring]


def areas(labels: Labels) -> list[Area]:
    """Find the areas of a map of labels `(rows, columns)`; what is negative belongs to none."""
    number = components(labels)
    order = np.argsort(number, axis=None, kind="stable")
    sorted_numbers = number.ravel()[order]
    found = []
    for part in np.split(order, np.flatnonzero(np.diff(sorted_numbers)) + 1):
        cells = np.stack(np.unravel_index(part, labels.shape), axis=1)
        first = tuple(cells[0])
        if number[first] >= 0:
            found.append(Area(int(labels[first]), cells, _rings(cells)))
    return found


def components(labels: Labels) -> NDArray[np.int64]:
    """Number the areas: the least index of any of their cells, -1 where the label is negative."""
    number = np.where(labels >= 0, np.arange(labels.size).reshape(labels.shape), -1)
    while True:
        spread = number.copy()
        for axis in (0, 1):
            for flipped in (False, True):
                _sweep(spread, labels, axis, flipped)
        if (spread == number).all():
            return spread
        number = spread


def _sweep(number: NDArray[np.int64], labels: Labels, axis: int, flipped: bool) -> None:
    """Carry numbers from line to line across edges between cells of one label."""
    lines, of = np.moveaxis(number, axis, 0), np.moveaxis(labels, axis, 0)
    if flipped:
        lines, of = lines[::-1], of[::-1]
    for at in range(1, len(lines)):
        same = (of[at] == of[at - 1]) & (of[at] >= 0)
        lines[at][same] = np.minimum(lines[at], lines[at - 1])[same]


def _rings(cells: NDArray[np.int64]) -> list[Ring]:
    """Walk along the edges with the area on the right; the ring around most comes first."""
    leaving = _edges(cells)
    rings = []
    while leaving:
        start = min(leaving)
        rings.append(_walk(leaving, start))
    return sorted(rings, key=lambda ring: -abs(_doubled_area(ring)))


def _edges(cells: NDArray[np.int64]) -> dict[Corner, list[int]]:
    """Directions of the outer edges that leave each corner."""
    inside = {(int(row), int(column)) for row, column in cells}
    leaving: dict[Corner, list[int]] = defaultdict(list)
    for row, column in inside:
        sides = (
            ((row - 1, column), (row, column), 0),
            ((row, column + 1), (row, column + 1), 1),
            ((row + 1, column), (row + 1, column + 1), 2),
            ((row, column - 1), (row + 1, column), 3),
        )
        for beside, corner, direction in sides:
            if beside not in inside:
                leaving[corner].append(direction)
    return dict(leaving)


def _walk(leaving: dict[Corner, list[int]], start: Corner) -> Ring:
    """Take the edges of one ring out of `leaving`; only corners where it turns are kept.

    Where two cells touch at a corner alone it turns away from the area. Each ring then goes around
    one piece of what lies outside, so that none meets itself: a hole touches at the most.
    """
    corner, direction = start, leaving[start][0]
    ring: Ring = []
    last = None
    while corner in leaving:
        ways = leaving[corner]
        if last is not None:
            away = [(last + 3) % 4, last, (last + 1) % 4]
            direction = next(way for way in away if way in ways)
        ways.remove(direction)
        if not ways:
            del leaving[corner]
        if direction != last:
            ring.append(corner)
        down, across = _STEPS[direction]
        corner, last = (corner[0] + down, corner[1] + across), direction
        if corner == start:
            break
    return [*ring, ring[0]]


def _doubled_area(ring: Ring) -> int:
    return sum(
        below[1] * above[0] - above[1] * below[0] for above, below in itertools.pairwise(ring)
    )
