"""One stored CT slice -> a small slice of mean HU, without the large one in floating point.

The rescale to HU is linear, so it may follow the mean, and whole numbers add up exactly. Clamping
is not: it comes first, as a whole number too. Where that can't be done exactly (a slope other than
1, padding inside the range of HU, sides that are no multiple of the small ones) the slice goes
through `frame_hu` and the exact area mean of any ratio.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cdt_runtime.dicom_frame import Frame
from cdt_runtime.dicom_pixels import AIR_HU, frame_hu, padding_in_tissue, stored_values
from cdt_runtime.preprocess import area_resize

Float = npt.NDArray[np.float32]


def reduced_hu(payload: bytes | memoryview, frame: Frame, side: int) -> tuple[Float, float]:
    """Bring one frame to `side` x `side` means.

    Args:
        payload: its bytes, as stored.
        frame: its header.
        side: of the result.

    Returns:
        `(side, side)` float32 HU, as the frame is stored, and the lowest HU before any mean.

    Raises:
        SeriesError: the pixels are damaged or cut short.
    """
    low = _lowest_stored(frame)
    layout = frame.layout
    if low is None or layout.rows % side or layout.columns % side:
        hu = frame_hu(payload, frame)
        return area_resize(hu, (side, side)), float(hu.min())
    stored = stored_values(payload, frame)
    lowest = int(stored.min())
    if lowest < low:
        # In place where the memory is ours: a new slice of this size costs more than the clamping.
        own = stored if stored.flags.writeable else None
        # A row in place of a number: numpy is four times as fast with it.
        floor = np.full(layout.columns, low, stored.dtype)
        stored = np.maximum(stored, floor, out=own)
    means = _block_sums(stored, side) * (1.0 / (stored.size // side**2))
    intercept = frame.rescale.intercept
    return (means + intercept).astype(np.float32), max(lowest + intercept, AIR_HU)


def _lowest_stored(frame: Frame) -> int | None:
    """The stored value of air, or None where clamping to it is not all that there is to do."""
    rescale, layout = frame.rescale, frame.layout
    low = AIR_HU - rescale.intercept
    if rescale.slope != 1.0 or low != int(low) or layout.bits_stored > 16:
        return None
    least = -(1 << (layout.bits_stored - 1)) if layout.signed else 0
    most = least + (1 << layout.bits_stored) - 1
    if frame.padding is not None and not padding_in_tissue(frame):
        below, above = frame.padding
        if below < least or above > low:  # bits that are not stored, or more than clamping does
            return None
    return int(low) if low <= most else None


def _block_sums(values: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Sums of the blocks of a 2D array of at most 16 bits, exactly."""
    rows, columns = values.shape
    tall = np.add.reduce(values.reshape(side, rows // side, columns), axis=1, dtype=np.int32)
    wide = columns // side
    total: npt.NDArray[Any] = tall[:, ::wide].copy()
    if values.size // side**2 >= 1 << 15:  # more than 32 bits can hold
        total = total.astype(np.int64)
    for offset in range(1, wide):
        total += tall[:, offset::wide]
    return total
