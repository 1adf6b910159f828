"""A folder of DICOM files -> a CT volume in Hounsfield units (HU).

    scan_series    headers only: finds the series and checks its geometry
    load_volume    decodes the pixels of a scanned series
    load_reduced   brings each slice to small means as it comes
    read_series    scan_series, then load_volume

The scan alone tells whether a series can be used and names its `state`, so that a caller can look
into a cache before any pixel is read. Everything wrong with the input is a SeriesError of
one line. No header text leaves this module: attributes are named, their values are not, save sizes,
geometry and the UIDs to choose a series by. Nor does any folder above the last: their names tell
patients and dates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdt_runtime.ct_folder import check_alike, choose, drop_odd_orientation, in_order, scan_folder
from cdt_runtime.ct_geometry import Geometry, geometry_of
from cdt_runtime.ct_pass import Batch, each_batch, mean_volume
from cdt_runtime.dicom_frame import MAX_VOXELS, Frame, frames_of
from cdt_runtime.dicom_header import PixelFile, reading
from cdt_runtime.dicom_pixels import hu_of, open_raw, padding_in_tissue
from cdt_runtime.dicom_quiet import quiet
from cdt_runtime.errors import SeriesError
from cdt_runtime.preprocess import area_resize
from cdt_runtime.printable import counted
from cdt_runtime.volume import Volume, describe

HASH_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Series:
    """A CT series whose headers were read and found good.

    Attributes:
        frames: its slices, ordered towards the head.
        geometry: the grid that they fill.
        warnings: one line each.
    """

    frames: tuple[Frame, ...] = field(repr=False)
    geometry: Geometry = field(repr=False)
    warnings: tuple[str, ...] = ()

    @cached_property
    def series_hash(self) -> str:
        """SHA-256 of the slice files in slice order, in hexadecimal; reads them whole."""
        digest = hashlib.sha256()
        for file in _files(self.frames):
            with reading(file.name), open_raw(file) as stream:
                while chunk := stream.read(HASH_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    @property
    def state(self) -> str:
        """Differs where a file was changed, moved or copied, on this machine; reads none."""
        # Where the grid is not even, the slices in use hang on what the caller allows.
        parts = [f"{':'.join(map(str, f.file.state))}/{f.index}" for f in self.frames]
        return hashlib.sha256("|".join([*parts, repr(self.geometry)]).encode()).hexdigest()

    @property
    def description(self) -> str:
        """As the description of the volume that it becomes."""
        return describe(self.geometry.shape, self.geometry.spacing_mm)


def scan_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    min_slices: int = 8,
    allow_resample: bool = False,
) -> Series:
    """Finds the CT series in a folder and checks everything but its pixels.

    Args:
        folder: searched with all its subfolders; links are not followed.
        series_uid: the SeriesInstanceUID to take where there are several.
        min_slices: fewer are an error.
        allow_resample: interpolate to an even grid where slice gaps differ, instead of an error.

    Raises:
        SeriesError: no series, more than one, or one that can't become a volume.
    """
    with quiet():
        headers, warnings = choose(scan_folder(Path(folder)), series_uid)
        frames, odd = drop_odd_orientation([f for header in headers for f in frames_of(header)])
        check_alike(frames)
        frames, copies = in_order(frames)
    _check_number(frames, min_slices)
    geometry, uneven = geometry_of(frames, allow_resample)
    notes = [*warnings, *odd, *copies, *uneven, *_value_warnings(frames)]
    return Series(tuple(frames), geometry, tuple(notes))


def _check_number(frames: Sequence[Frame], min_slices: int) -> None:
    if len(frames) < min_slices:
        raise SeriesError(
            f"the series has {counted(len(frames), 'slice')}, expected at least {min_slices}: "
            "give the full series"
        )
    voxels = len(frames) * frames[0].layout.rows * frames[0].layout.columns
    if voxels > MAX_VOXELS:
        raise SeriesError(f"the series has {voxels} voxels, expected at most {MAX_VOXELS}: crop it")


def _value_warnings(frames: Sequence[Frame]) -> list[str]:
    """What is odd about the values but not wrong."""
    checks = {
        "RescaleSlope or RescaleIntercept is missing: 1 and 0 were taken": [
            not f.rescale.given for f in frames
        ],
        "PixelPaddingValue lies inside the range of tissue: not masked": [
            padding_in_tissue(f) for f in frames
        ],
        "the pixels were compressed with loss": [f.file.syntax.lossy for f in frames],
    }
    return [f"{text} ({counted(sum(hits), 'slice')})" for text, hits in checks.items() if any(hits)]


def _files(frames: Sequence[Frame]) -> list[PixelFile]:
    """Each file once, in slice order."""
    return list({frame.file.path: frame.file for frame in frames}.values())


def load_volume(series: Series) -> Volume:
    """Decodes the pixels of a scanned series.

    Raises:
        SeriesError: a file changed since the scan, or its pixels are damaged.
    """
    stack = np.empty((len(series.frames), *series.geometry.shape[1:]), np.float32)
    lowest = np.empty(len(series.frames))

    def take(batch: Batch, cells: npt.NDArray[Any]) -> None:
        hu = hu_of(cells, batch.frames[0])
        placed = series.geometry.placed(hu, batch.place)
        stack[batch.place], lowest[batch.place] = placed, hu.min()

    with quiet():
        each_batch([Batch(n, (frame,)) for n, frame in enumerate(series.frames)], lambda: take)
    _check_hu(float(lowest.min()), series.frames)
    return Volume(
        hu=_resampled(stack, series.geometry),
        spacing_mm=series.geometry.spacing_mm,
        origin_mm=series.geometry.origin_mm,
        direction=series.geometry.direction,
        series_hash=series.series_hash,
        warnings=series.warnings,
    )


def load_reduced(series: Series, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Decodes a scanned series slice by slice, each reduced at once: no volume is held.

    Where a tilted gantry has to be undone, one is.

    Args:
        series: what `scan_series` gave.
        shape: `(D, side, side)` of the result.

    Returns:
        `shape` float32: mean HU of the canonical volume over the exact box of each; along an axis
        that grows, linear interpolation.

    Raises:
        SeriesError: as `load_volume`.
    """
    if series.geometry.shifts:
        return area_resize(load_volume(series).hu, shape)
    with quiet():
        means, lowest = mean_volume(series.frames, series.geometry, shape)
    _check_hu(lowest, series.frames)
    return means


def _check_hu(lowest: float, frames: Sequence[Frame]) -> None:
    """Without a rescale the values must look like HU: air is below zero."""
    odd = next((frame for frame in frames if not frame.rescale.given), None)
    if odd is not None and lowest >= 0:
        raise SeriesError(
            f"{odd.name}: RescaleIntercept is missing and no value lies below 0, so they can't be "
            "HU: export the series again from the archive"
        )


def _resampled(stack: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.float32]:
    """Linear interpolation between the two nearest slices; a whole number is that slice itself."""
    at = np.array(geometry.at)
    if np.array_equal(at, np.arange(len(stack))):
        return stack
    below = np.minimum(at.astype(int), len(stack) - 2)
    out = np.empty((len(at), *stack.shape[1:]), np.float32)
    for slot, (low, part) in enumerate(zip(below, (at - below).astype(np.float32), strict=True)):
        out[slot] = stack[low] * (1 - part) + stack[low + 1] * part
    return out


def read_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    min_slices: int = 8,
    allow_resample: bool = False,
) -> Volume:
    """`scan_series`, then `load_volume`."""
    series = scan_series(
        folder, series_uid=series_uid, min_slices=min_slices, allow_resample=allow_resample
    )
    return load_volume(series)
