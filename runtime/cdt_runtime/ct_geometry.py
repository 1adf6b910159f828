"""Where the slices of a series lie: order, gaps, orientation.

Positions alone count, never names, InstanceNumber or the tilt attribute.
Slices are ordered towards the head along their normal. In LPS coordinates x grows to the patient's
left, y to the back and z to the head, so the canonical array axes (z, y, x) have a direction matrix
near the identity with its rows reversed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdt_runtime.dicom_fields import EXPORT_AGAIN
from cdt_runtime.dicom_frame import MAX_SPACING_MM, MAX_VOXELS, MIN_SPACING_MM, Frame, Vector
from cdt_runtime.errors import SeriesError

Array = npt.NDArray[np.float64]

COS_45 = math.cos(math.radians(45)) - 1e-9
PLANES = ("sagittal", "coronal", "axial")
AIR = np.float32(-1024)
MAX_TILT = 45.0
"""Degrees; gantries tilt by 30."""


@dataclass(frozen=True)
class Geometry:
    """The grid of a volume and how its slices get there."""

    shape: tuple[int, int, int]
    """(D, H, W) of the canonical volume."""
    spacing_mm: Vector
    """(z, y, x)."""
    origin_mm: Vector
    """LPS (x, y, z) of voxel (0, 0, 0)."""
    direction: tuple[Vector, Vector, Vector]
    """Row i: LPS unit vector of array axis i."""
    swap: bool
    """Transpose a slice before it is flipped."""
    flip: tuple[bool, bool]
    """Flip a slice's rows, its columns (after the transpose)."""
    at: tuple[float, ...]
    """Where each output slice lies, counted in input slices: whole numbers but after resampling."""
    shifts: tuple[tuple[float, float], ...] = ()
    """Pixels down and across by which each input slice is moved, on a slice of the shape's size;
    none where the gantry stood upright."""

    def turn(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A slice as it is stored -> as it lies in the canonical volume."""
        turned = pixels.T if self.swap else pixels
        return turned[:: -1 if self.flip[0] else 1, :: -1 if self.flip[1] else 1]

    def placed(self, pixels: npt.NDArray[np.float32], index: int) -> npt.NDArray[np.float32]:
        """A slice as it is stored -> as it lies in the canonical volume, a tilt undone.

        Args:
            pixels: HU.
            index: of the slice.
        """
        turned = self.turn(pixels)
        if not self.shifts:
            return turned
        return moved(turned, self.shifts[index], self.shape[1:])


def moved(
    pixels: npt.NDArray[np.float32], shift: tuple[float, float], shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Move a slice on a larger one of air, by linear interpolation.

    Args:
        pixels: `(h, w)` HU.
        shift: pixels down and across, at least 0.
        shape: `(H, W)` of the result; it has room for the slice.
    """
    for axis, (by, length) in enumerate(zip(shift, shape, strict=True)):
        whole = int(by)
        part = np.float32(by - whole)
        pad = [(0, 0), (0, 0)]
        pad[axis] = (whole, length - whole - pixels.shape[axis])
        pixels = np.pad(pixels, pad, constant_values=AIR)
        if part:
            pixels = pixels * (1 - part) + np.roll(pixels, 1, axis) * part
    return pixels


def normal_of(frame: Frame) -> Array:
    """Unit normal of a slice; its sign is as the header has it."""
    normal = np.cross(frame.row_direction, frame.column_direction)
    return np.asarray(normal / np.linalg.norm(normal))


def headward_normal(frame: Frame) -> Array:
    """Unit normal that points to the head.

    Raises:
        SeriesError: the slice is more than 45 degrees off axial.
    """
    normal = normal_of(frame)
    if abs(normal[2]) < COS_45:
        plane = PLANES[int(np.argmax(np.abs(normal)))]
        angle = math.degrees(math.acos(min(1.0, abs(float(normal[2])))))
        raise SeriesError(
            f"{frame.name}: the series is {plane}, {angle:.0f} degrees off axial, expected at most "
            "45: give the axial series"
        )
    return normal if normal[2] > 0 else -normal


def along(frames: Sequence[Frame], normal: Array) -> Array:
    """`(n,)` millimetres of each slice along the normal."""
    return np.array([frame.position for frame in frames]) @ normal


def tolerance(gap: float) -> float:
    """Jitter of slice positions that scanners and rounding make, in mm."""
    return max(0.01 * gap, 0.1)


def _check_spacing(gap: float) -> None:
    """Before the gaps are compared: no resampling mends slices that are all too far apart."""
    if not MIN_SPACING_MM <= gap <= MAX_SPACING_MM:
        cure = "give the full series" if gap > MAX_SPACING_MM else EXPORT_AGAIN
        raise SeriesError(
            f"slice spacing is {gap:.4g} mm, expected {MIN_SPACING_MM} to {MAX_SPACING_MM:g} mm: "
            f"{cure}"
        )


def _drift(frames: Sequence[Frame], normal: Array, gap: float) -> Array | None:
    """How far slices shift sideways against their normal, of one millimetre along it.

    Returns:
        `(3,)`; None where they are stacked along their normal.

    Raises:
        SeriesError: some are shifted, but not as those of a tilted gantry.
    """
    offsets = np.array([frame.position for frame in frames])
    offsets -= offsets[0]
    depth = offsets @ normal
    sideways = offsets - depth[:, None] * normal
    far = np.linalg.norm(sideways, axis=1)
    # Directions are written with few digits, which tells over a long series.
    bad = np.flatnonzero(far > tolerance(gap) + 1e-3 * depth)
    if not len(bad):
        return None
    slope = sideways[-1] / depth[-1]
    off_line = np.linalg.norm(sideways - depth[:, None] * slope, axis=1)
    angle = math.degrees(math.atan(float(np.linalg.norm(slope))))
    if off_line.max() <= tolerance(gap) + 0.01 * gap and angle <= MAX_TILT:
        return np.asarray(slope)
    first = int(bad[0])
    raise SeriesError(
        f"{frames[first].name}: slice shifted sideways by {far[first]:.2f} mm at index "
        f"{first}, expected at most {tolerance(gap):.2f} mm: take out the slices of another scan"
    )


def _shear(
    slope: Array, depth: Array, sides: tuple[int, int], axes: tuple[Array, Array]
) -> tuple[tuple[tuple[float, float], ...], tuple[int, int]]:
    """How slices are moved to undo a tilt, and the size that holds them all.

    Args:
        slope: as `_drift` gives it.
        depth: millimetres of each slice along the normal, from the first.
        sides: height and width of a slice, canonical.
        axes: millimetre vector of a pixel down, of a pixel across.
    """
    down, across = (depth * (slope @ axis) / (axis @ axis) for axis in axes)
    down, across = down - down.min(), across - across.min()
    size = sides[0] + math.ceil(down.max()), sides[1] + math.ceil(across.max())
    return tuple(zip(down.tolist(), across.tolist(), strict=True)), size


def _uneven(depth: Array, gap: float) -> int | None:
    """Index of a gap that is not `gap`, or None where the slices lie on an even grid.

    Each slice is held against the straight line through all of them: small errors of the gaps that
    add up to a drift count, jitter that evens out does not. In a series so fine that a missing
    slice hides in the tolerance, its gap of twice the others still tells.
    """
    steps = np.arange(len(depth))
    off_line = np.abs(depth - np.polyval(np.polyfit(steps, depth, 1), steps))
    off_gap = np.abs(np.diff(depth) - gap)
    if off_line.max() <= tolerance(gap) + 1e-6 and off_gap.max() < 0.5 * gap:
        return None
    bad = np.flatnonzero(off_gap > tolerance(gap) + 1e-6)
    wide = np.flatnonzero(off_gap >= 0.5 * gap)
    return int(next((found[0] for found in (bad, wide) if len(found)), off_gap.argmax()))


def _grid(
    frames: Sequence[Frame], depth: Array, allow_resample: bool
) -> tuple[float, tuple[float, ...], list[str]]:
    """Slice spacing, where the output slices lie, and warnings."""
    gaps = np.diff(depth)
    gap = float(np.median(gaps))
    index = _uneven(depth, gap)
    if index is None:
        return float(gaps.mean()), tuple(map(float, range(len(depth)))), []
    between = f"between {frames[index].name} and {frames[index + 1].name}"
    if not allow_resample:
        raise SeriesError(
            f"slice gap {gaps[index]:.4g} mm at index {index}, expected {gap:.4g} mm: find what is "
            f"missing {between}, or interpolate with --allow-resample"
        )
    count = int((depth[-1] - depth[0]) / gap + 1e-6) + 1
    if count * frames[0].layout.rows * frames[0].layout.columns > MAX_VOXELS:
        raise SeriesError(
            f"slice gap {gaps.max():.4g} mm {between} is too wide to resample to {gap:.4g} mm: "
            "take out the stray slice"
        )
    at = np.interp(depth[0] + gap * np.arange(count), depth, np.arange(len(depth)))
    warning = (
        f"slice gaps are uneven ({gaps.min():.4g} to {gaps.max():.4g} mm): interpolated to "
        f"{gap:.4g} mm"
    )
    return gap, tuple(map(float, at)), [warning]


def _single(frame: Frame) -> tuple[float, tuple[float, ...], list[str]]:
    thickness = frame.thickness
    if thickness is None:
        raise SeriesError(
            f"{frame.name}: SliceThickness is missing, a lone slice needs it: add slices"
        )
    _check_spacing(thickness)
    return thickness, (0.0,), ["one slice only: its SliceThickness was taken as the slice spacing"]


def _in_plane(frame: Frame) -> tuple[bool, tuple[bool, bool], Array, Array]:
    """Transpose, flips and the canonical y and x directions of a slice."""
    row, column = np.array(frame.row_direction), np.array(frame.column_direction)
    swap = bool(abs(row[0]) + abs(column[1]) < abs(row[1]) + abs(column[0]))
    y, x = (row, column) if swap else (column, row)
    flip = bool(y[1] < 0), bool(x[0] < 0)
    return swap, flip, -y if flip[0] else y, -x if flip[1] else x


def _vector(values: Array) -> Vector:
    x, y, z = (float(v) + 0.0 for v in values)  # + 0.0 turns -0.0 into 0.0
    return x, y, z


def geometry_of(frames: Sequence[Frame], allow_resample: bool) -> tuple[Geometry, tuple[str, ...]]:
    """The canonical grid of slices that are ordered towards the head.

    Args:
        frames: at least one; equal in size, spacing and orientation; no two at one position.
        allow_resample: interpolate where gaps differ, instead of an error.

    Returns:
        The geometry and the warnings to report.

    Raises:
        SeriesError: gaps differ or are out of range, slices are shifted, or the series is not
            axial.
    """
    first = frames[0]
    normal = headward_normal(first)
    depth = along(frames, normal)
    depth = depth - depth[0]
    slope = None
    if len(frames) > 1:
        median = float(np.median(np.diff(depth)))
        _check_spacing(median)
        slope = _drift(frames, normal, median)
        gap, at, warnings = _grid(frames, depth, allow_resample)
    else:
        gap, at, warnings = _single(first)
    swap, flip, y, x = _in_plane(first)
    rows, columns = first.layout.rows, first.layout.columns
    height, width = (columns, rows) if swap else (rows, columns)
    dy, dx = reversed(first.spacing) if swap else first.spacing
    origin = np.array(first.position)
    # A flipped axis starts at what was its far end.
    origin -= y * (dy * (height - 1) * flip[0]) + x * (dx * (width - 1) * flip[1])
    shifts: tuple[tuple[float, float], ...] = ()
    if slope is not None:
        shifts, (height, width) = _shear(slope, depth, (height, width), (y * dy, x * dx))
        _check_size(len(at), height, width)
        # The first slice need not lie at the corner any more.
        origin -= y * (dy * shifts[0][0]) + x * (dx * shifts[0][1])
        angle = math.degrees(math.atan(float(np.linalg.norm(slope))))
        warnings = [*warnings, f"the gantry was tilted by {angle:.1f} degrees: corrected by shear"]
    grid = Geometry(
        shape=(len(at), height, width),
        spacing_mm=(gap, dy, dx),
        origin_mm=_vector(origin),
        direction=(_vector(normal), _vector(y), _vector(x)),
        swap=swap,
        flip=flip,
        at=at,
        shifts=shifts,
    )
    return grid, tuple(warnings)


def _check_size(depth: int, height: int, width: int) -> None:
    if depth * height * width > MAX_VOXELS:
        raise SeriesError(
            f"the series has {depth * height * width} voxels once its tilt is undone, expected at "
            f"most {MAX_VOXELS}: crop it"
        )
