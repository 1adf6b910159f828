"""A CT volume from an npz file: `hu` (D, H, W) and, where it is known, `spacing_mm` (z, y, x)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_runtime.volume import Volume
from cdt_train.data.npz import (
    Header,
    read_arrays,
    read_headers,
    require_array,
    require_dtype,
    require_finite,
)

SPACING_NAMES = ("spacing_mm", "spacing_zyx")
ASSUMED_MM = (2.0, 2.0, 2.0)
LOWEST_HU = -1024
AXES = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))


@dataclass(frozen=True, eq=False)
class NpzVolume:
    """What a file holds.

    Attributes:
        hu: `(D, H, W)` int16 or float32, as in the file; z grows to the head.
        spacing_mm: (z, y, x), or None where the file does not say.
    """

    hu: NDArray[Any]
    spacing_mm: tuple[float, float, float] | None


def read_npz_hu(path: Path) -> NpzVolume:
    """Read `hu` and the spacing.

    Raises:
        DatasetError: an array is missing, of another shape or dtype, or not finite.
    """
    headers = read_headers(path)
    header = require_array(path, headers, "hu")
    _require_volume(path, header)
    named = [name for name in SPACING_NAMES if name in headers]
    if named:
        spacing = headers[named[0]]
        if spacing.shape != (3,) or spacing.dtype.kind not in "uif":
            raise DatasetError(
                f"{path}: array '{named[0]}' is {spacing.dtype.name} of shape {spacing.shape}, "
                "expected 3 numbers: z, y and x in mm"
            )
    arrays = read_arrays(path, ["hu", *named[:1]])
    require_finite(path, "hu", arrays["hu"])
    return NpzVolume(arrays["hu"], _spacing(path, arrays[named[0]]) if named else None)


def read_npz_volume(path: Path, min_slices: int) -> Volume:
    """Read a volume as the runtime's own, so that it is preprocessed as a DICOM series is.

    Its axes are taken to run to the head, to the back and to the patient's left. A file without a
    spacing is taken to have 2 mm on every axis, and the volume says so in its warnings.

    Raises:
        DatasetError: the file can't be used, or has fewer slices.
    """
    found = read_npz_hu(path)
    if len(found.hu) < min_slices:
        raise DatasetError(
            f"{path}: array 'hu' has {len(found.hu)} slices, expected at least {min_slices}: give "
            "the full series"
        )
    assumed = f"no {SPACING_NAMES[0]} in the file: taken to be 2 mm on every axis"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Volume(
        hu=np.maximum(found.hu, LOWEST_HU, dtype=np.float32),
        spacing_mm=found.spacing_mm or ASSUMED_MM,
        origin_mm=(0.0, 0.0, 0.0),
        direction=AXES,
        series_hash=digest,
        warnings=() if found.spacing_mm else (assumed,),
    )


def _require_volume(path: Path, header: Header) -> None:
    require_dtype(path, "hu", header, ("int16", "float32"))
    if len(header.shape) != 3 or 0 in header.shape:
        raise DatasetError(f"{path}: array 'hu' has the shape {header.shape}, expected (D, H, W)")


def _spacing(path: Path, array: NDArray[Any]) -> tuple[float, float, float]:
    values = [float(value) for value in array]
    if not all(0.05 <= value <= 10 for value in values):  # NaN compares false
        raise DatasetError(
            f"{path}: spacing is {values} mm (z, y, x), expected 0.05 to 10: correct it"
        )
    return (values[0], values[1], values[2])
