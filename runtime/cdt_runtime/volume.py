"""A CT volume, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vector = tuple[float, float, float]


def describe(shape: tuple[int, int, int], spacing_mm: Vector) -> str:
    """Say size and spacing in words, x before y before z."""
    (depth, height, width), (dz, dy, dx) = shape, spacing_mm
    return f"{depth} slices of {width} x {height}, {dx:.2f} x {dy:.2f} x {dz:.2f} mm"


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT volume in canonical orientation.

    Attributes:
        hu: `(D, H, W)` float32 HU, at least -1024; z grows to the head, y to the back, x to the
            patient's left.
        spacing_mm: (z, y, x).
        origin_mm: LPS (x, y, z) of the centre of voxel (0, 0, 0).
        direction: row i is the LPS unit vector (x, y, z) of array axis i.
        series_hash: sha256 of the slice files in slice order, in hexadecimal.
        warnings: one line each.
    """

    hu: npt.NDArray[np.float32] = field(repr=False)
    spacing_mm: Vector
    origin_mm: Vector
    direction: tuple[Vector, Vector, Vector]
    series_hash: str
    warnings: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Size and spacing in words, x before y before z; never any header text."""
        depth, height, width = self.hu.shape
        return describe((depth, height, width), self.spacing_mm)
