"""One stored CT slice -> a small slice of mean HU, without the large one in floating point.

The rescale to HU is linear, so it may follow the mean, and whole numbers add up exactly: modulo
2^16 where the sums of a column of a block, less the lowest value, fit 16 bits, else in 32. Clamping
is not linear: where there is something below air, it comes first, as a whole number too. What can't
be done exactly (air between two stored values, padding inside the range of HU, sides that are no
multiple of the small ones) goes through `hu_of` and the exact area mean of any ratio.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cdt_runtime.dicom_frame import Frame
from cdt_runtime.dicom_pixels import AIR_HU, hu_of, padding_in_tissue, stored_of
from cdt_runtime.preprocess import area_resize

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]

RUN = 1 << 14
"""Values that numpy clamps at a time: with rows of a slice it takes twice as long."""

FOUR = np.uint64(0x0001_0001_0001_0001)
"""Times this, the highest 16 of 64 bits hold the sum of all four."""


class Reducer:
    """Brings slices to means in memory of its own: one for each thread.

    Args:
        side: of the small slices.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self._tall = np.empty((0, 0), np.uint16)
        self._floor = np.empty(0, np.uint16)

    def means(self, cells: Array, frame: Frame) -> tuple[Float, float]:
        """Bring slices to one of `side` x `side` means.

        Args:
            cells: `(count * rows, columns)`, as `cells_of` gives them; overwritten where they can
                be.
            frame: the header of any of them: they share layout, rescale and padding.

        Returns:
            `(side, side)` float32 HU, as the frames are stored, and the lowest HU before any mean;
            where the file gives its rescale that may be any value that none is below.
        """
        layout, side = frame.layout, self.side
        if layout.bits_allocated == 16 and not (layout.rows % side or layout.columns % side):
            found = self._exact(cells, frame)
            if found is not None:
                return found
        hu = [hu_of(one, frame) for one in cells.reshape(-1, layout.rows, layout.columns)]
        small = np.stack([area_resize(one, (side, side)) for one in hu])
        return small.mean(axis=0, dtype=np.float32), min(float(one.min()) for one in hu)

    def _exact(self, cells: Array, frame: Frame) -> tuple[Float, float] | None:
        """As `means`, or None where whole numbers don't do; then the cells are as they were."""
        air = _stored_air(frame)
        if air is None:
            return None
        stored, lowest, highest = _with_range(cells, frame, air)
        if lowest < air:
            low = int(air)
            if low != air or highest < low:
                return None
            stored, lowest = self._clamped(stored, low), low
        slope, intercept = frame.rescale.slope, frame.rescale.intercept
        sums, base = self._block_sums(stored, frame.layout.rows, lowest, highest)
        small = sums * (slope / (stored.size // self.side**2))
        small += base * slope + intercept
        return small.astype(np.float32), lowest * slope + intercept

    def _clamped(self, stored: Array, low: int) -> Array:
        """Nothing below `low`; in place where the memory is ours, for a new slice costs more."""
        run = math.gcd(stored.size, RUN)
        if len(self._floor) != run or self._floor.dtype != stored.dtype or self._floor[0] != low:
            self._floor = np.full(run, low, stored.dtype)
        runs = stored.reshape(-1, run)
        # Runs in place of a number: numpy is several times as fast with them.
        out = runs if stored.flags.writeable else None
        return np.maximum(runs, self._floor, out=out).reshape(stored.shape)

    def _block_sums(self, stored: Array, rows: int, lowest: int, highest: int) -> tuple[Array, int]:
        """Exact sums over blocks and slices, each value less a base; and that base."""
        side, columns = self.side, stored.shape[1]
        high, wide, tiers = rows // side, columns // side, len(stored) // rows * side
        spread = (highest - lowest) * high
        blocks = stored.reshape(tiers, high, columns)
        if spread >= 1 << 16:
            tall = np.add.reduce(blocks, axis=1, dtype=np.int32)
            return _stacked(_columns(tall, wide), side), 0
        if self._tall.shape != (tiers, columns):
            self._tall = np.empty((tiers, columns), np.uint16)
        tall = np.add.reduce(blocks.view(np.uint16), axis=1, dtype=np.uint16, out=self._tall)
        if lowest:
            tall -= np.uint16(lowest * high & 0xFFFF)
        if wide != 4 or spread * wide >= 1 << 16:
            return _stacked(_columns(tall, wide), side), lowest
        fours = tall.view(np.uint64)
        fours *= FOUR
        fours >>= np.uint64(48)
        return _stacked(fours.view(np.int64), side), lowest  # signed become floats twice as fast


def _stacked(sums: Array, side: int) -> Array:
    """Sums of slices that lie below each other -> their sum."""
    total: Array = sums.reshape(-1, side, side).sum(axis=0)
    return total


def _columns(tall: Array, wide: int) -> Array:
    """Sums of every `wide` columns."""
    total: Array = tall[:, ::wide].astype(np.int64 if tall.dtype == np.int32 else np.int32)
    for offset in range(1, wide):
        total += tall[:, offset::wide]
    return total


def _stored_air(frame: Frame) -> float | None:
    """The stored value of air; None where clamping to it is not all that there is to do."""
    layout, rescale = frame.layout, frame.rescale
    air = (AIR_HU - rescale.intercept) / rescale.slope
    if frame.padding is not None and not padding_in_tissue(frame):
        below, above = frame.padding
        least, _ = _bounds(frame)
        if below < least or above > air:  # bits that are not stored, or more than clamping does
            return None
    return air if layout.bits_stored <= 16 else None


def _bounds(frame: Frame) -> tuple[int, int]:
    """Lowest and highest value that the stored bits can hold."""
    bits, signed = frame.layout.bits_stored, frame.layout.signed
    least = -(1 << (bits - 1)) if signed else 0
    return least, least + (1 << bits) - 1


def _with_range(cells: Array, frame: Frame, air: float) -> tuple[Array, int, int]:
    """Stored values, and the lowest and highest of them."""
    layout, (least, most) = frame.layout, _bounds(frame)
    stored = cells.view(np.int16) if layout.signed else cells
    # Where nothing can lie below air, zero is as good as the lowest.
    lowest = 0 if not layout.signed and air <= 0 and frame.rescale.given else int(stored.min())
    highest = int(stored.max())
    if least <= lowest and highest <= most:
        return stored, lowest, highest
    stored = stored_of(cells, layout)
    return stored, int(stored.min()), int(stored.max())
