"""The frames of one DICOM file: where each lies in the patient and how its values become HU.

A classic CT file holds one frame and describes it at the top level; an Enhanced (multi-frame) file
holds many and describes them in functional groups, per frame or shared by all. Both come out as
`Frame`, with every number checked.

Source: DICOM PS3.3 C.7.6.2 (image plane), C.7.6.3 (image pixel), C.8.2.1 (CT image), C.7.6.16
(multi-frame functional groups).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cdt_runtime.dicom_fields import EXPORT_AGAIN, Fields
from cdt_runtime.dicom_header import PIXEL_DATA, Header, PixelFile
from cdt_runtime.dicom_walk import UNDEFINED_LENGTH
from cdt_runtime.errors import SeriesError
from cdt_runtime.printable import counted

MAX_SIDE = 4096
"""Rows and Columns; CT scanners write 512 to 2048."""
MAX_VOXELS = 1 << 30
"""Voxels in a series: 4 GB as float32."""
MIN_SPACING_MM, MAX_SPACING_MM = 0.05, 10.0
UNIT_TOLERANCE = 1e-3

NOT_HU_IMAGES = frozenset({"PERFUSION", "VELOCITY", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY"})
NOT_HU_TYPES = frozenset({"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"})
GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class PixelLayout:
    """How the stored values of a file are laid out."""

    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame when it is not compressed."""
        return self.rows * self.columns * self.bits_allocated // 8


@dataclass(frozen=True)
class Rescale:
    """HU = slope x stored value + intercept."""

    slope: float
    intercept: float
    given: bool
    """False where the file does not say, so that 1 and 0 were taken."""


@dataclass(frozen=True)
class Frame:
    """One slice: its pixels, its plane in the patient and its scale."""

    file: PixelFile
    index: int
    """Which frame of the file, from 0."""
    layout: PixelLayout
    position: Vector
    """LPS millimetres of the centre of the first pixel."""
    row_direction: Vector
    """LPS unit vector along a row: the way the column index grows."""
    column_direction: Vector
    spacing: tuple[float, float]
    """Millimetres between rows, then between columns."""
    thickness: float | None
    rescale: Rescale
    padding: tuple[int, int] | None
    """Lowest and highest stored value that means "not measured"."""

    @property
    def name(self) -> str:
        """How messages call the frame."""
        many = self.layout.frames > 1
        return f"{self.file.name} frame {self.index}" if many else self.file.name

    def moved(self, file: PixelFile, position: Vector) -> Frame:
        """The frame of another file that differs in its place alone."""
        return Frame(
            file,
            self.index,
            self.layout,
            position,
            self.row_direction,
            self.column_direction,
            self.spacing,
            self.thickness,
            self.rescale,
            self.padding,
        )


def _layout(fields: Fields) -> PixelLayout:
    layout = PixelLayout(
        rows=fields.integer("Rows"),
        columns=fields.integer("Columns"),
        frames=fields.integer("NumberOfFrames", default=1),
        bits_allocated=fields.integer("BitsAllocated"),
        bits_stored=fields.integer("BitsStored"),
        high_bit=fields.integer("HighBit", default=fields.integer("BitsStored") - 1),
        signed=bool(fields.integer("PixelRepresentation")),
    )
    _check_layout(fields, layout)
    return layout


def _check_layout(fields: Fields, layout: PixelLayout) -> None:
    for keyword, side in (("Rows", layout.rows), ("Columns", layout.columns)):
        if not 1 <= side <= MAX_SIDE:
            raise fields.error(keyword, f"is {side}, expected 1 to {MAX_SIDE}")
    voxels = layout.rows * layout.columns * layout.frames
    if not 1 <= voxels <= MAX_VOXELS:
        raise fields.error(
            "NumberOfFrames",
            f"gives {voxels} voxels, expected 1 to {MAX_VOXELS}",
            "crop the series",
        )
    if layout.bits_allocated not in (8, 16, 32):
        raise fields.error("BitsAllocated", f"is {layout.bits_allocated}, expected 8, 16 or 32")
    if not 1 <= layout.bits_stored <= layout.high_bit + 1 <= layout.bits_allocated:
        raise fields.error(
            "BitsStored",
            f"is {layout.bits_stored} with HighBit {layout.high_bit} and BitsAllocated "
            f"{layout.bits_allocated}, expected to fit",
        )


def _check_colour(fields: Fields) -> None:
    if fields.integer("SamplesPerPixel", default=1) != 1:
        raise fields.error("SamplesPerPixel", "is not 1, CT pixels are grey values")
    photometric = fields.text("PhotometricInterpretation").upper()
    if photometric == "MONOCHROME1":
        raise fields.error(
            "PhotometricInterpretation",
            "is MONOCHROME1, expected MONOCHROME2 (readers disagree on inverted CT)",
        )
    if photometric != "MONOCHROME2":
        raise fields.error("PhotometricInterpretation", "is not MONOCHROME2")


def _check_pixel_bytes(header: Header, layout: PixelLayout) -> None:
    file, fields = header.file, header.fields
    if header.pixel_tag is None:
        raise fields.error("PixelData", "is missing, the file may be cut short", "copy it again")
    if header.pixel_tag != PIXEL_DATA:
        raise fields.error("PixelData", "holds floating-point values, expected integers")
    encapsulated = file.length == UNDEFINED_LENGTH
    if encapsulated != bool(file.syntax.codec):
        raise fields.error("PixelData", "does not agree with the transfer syntax")
    if encapsulated:
        return
    needed = layout.frame_bytes * layout.frames
    if file.length < needed:
        raise fields.error(
            "PixelData",
            f"is {file.length} bytes, expected {needed} ({layout.rows} x {layout.columns} x "
            f"{layout.frames} frames x {layout.bits_allocated} bits)",
        )
    if not file.syntax.deflated and file.offset + needed > file.size:
        missing = counted(file.offset + needed - file.size, "byte")
        raise SeriesError(
            f"{file.name}: the file ends {missing} before its pixels do: it is cut short, copy it "
            "again"
        )


def _check_is_hu(fields: Fields) -> None:
    found = fields.words("ImageType") & NOT_HU_IMAGES
    if found:
        raise fields.error(
            "ImageType",
            f"says {min(found)}, these values are not HU",
            "give the source CT series instead of the map",
        )
    if fields.get("ModalityLUTSequence") is not None:
        raise fields.error("ModalityLUTSequence", "is a table, expected RescaleSlope and Intercept")


def _rescale(fields: Fields, layout: PixelLayout) -> Rescale:
    if fields.text("RescaleType").upper() in NOT_HU_TYPES:
        raise fields.error("RescaleType", "names another unit than HU", "give the CT series itself")
    slope, intercept = fields.number("RescaleSlope"), fields.number("RescaleIntercept")
    given = slope is not None and intercept is not None
    if not given and not layout.signed and not intercept:
        raise fields.error(
            "RescaleSlope" if slope is None else "RescaleIntercept",
            "is missing and the stored values are unsigned, so they can't be HU",
        )
    rescale = Rescale(
        1.0 if slope is None else slope, 0.0 if intercept is None else intercept, given
    )
    if not 1e-6 <= rescale.slope <= 1e3:
        raise fields.error("RescaleSlope", f"is {rescale.slope:g}, expected 1e-6 to 1000")
    if abs(rescale.intercept) > 1e5:
        raise fields.error("RescaleIntercept", f"is {rescale.intercept:g}, expected within 1e5")
    return rescale


def _padding(fields: Fields, layout: PixelLayout) -> tuple[int, int] | None:
    value = fields.stored_value("PixelPaddingValue", layout.signed)
    if value is None:
        return None
    limit = fields.stored_value("PixelPaddingRangeLimit", layout.signed)
    return (value, value) if limit is None else (min(value, limit), max(value, limit))


def _directions(fields: Fields) -> tuple[Vector, Vector]:
    """Unit vectors along a row and along a column, checked and made exactly unit."""
    numbers = fields.numbers("ImageOrientationPatient", 6)
    row, column = numbers[:3], numbers[3:]
    lengths = math.hypot(*row), math.hypot(*column)
    across = sum(a * b for a, b in zip(row, column, strict=True))
    if max(abs(n - 1) for n in lengths) > UNIT_TOLERANCE or abs(across) > UNIT_TOLERANCE:
        raise fields.error(
            "ImageOrientationPatient",
            f"has lengths {lengths[0]:.4f} and {lengths[1]:.4f} and dot product {across:.4f}, "
            "expected unit vectors at right angles",
        )
    r = (row[0] / lengths[0], row[1] / lengths[0], row[2] / lengths[0])
    c = (column[0] / lengths[1], column[1] / lengths[1], column[2] / lengths[1])
    return r, c


def _spacing(fields: Fields) -> tuple[float, float]:
    between_rows, between_columns = fields.numbers("PixelSpacing", 2)
    for value in (between_rows, between_columns):
        if not MIN_SPACING_MM <= value <= MAX_SPACING_MM:
            raise fields.error(
                "PixelSpacing",
                f"is {value:g} mm, expected {MIN_SPACING_MM} to {MAX_SPACING_MM:g} mm",
            )
    return between_rows, between_columns


def _position(fields: Fields) -> Vector:
    x, y, z = fields.numbers("ImagePositionPatient", 3)
    if max(abs(x), abs(y), abs(z)) > 1e5:
        raise fields.error("ImagePositionPatient", "is over 100 m away from the scanner")
    return x, y, z


def _frame(header: Header, fields: Fields, index: int, layout: PixelLayout) -> Frame:
    row, column = _directions(fields)
    return Frame(
        file=header.file,
        index=index,
        layout=layout,
        position=_position(fields),
        row_direction=row,
        column_direction=column,
        spacing=_spacing(fields),
        thickness=fields.number("SliceThickness"),
        rescale=_rescale(fields, layout),
        padding=_padding(fields, layout),
    )


def _frame_fields(header: Header, frames: int) -> Iterator[Fields]:
    """For each frame the data sets that describe it, the frame's own groups first."""
    top = header.fields
    shared = top.items("SharedFunctionalGroupsSequence")[:1]
    own = top.items("PerFrameFunctionalGroupsSequence")
    if not own and frames == 1:
        yield Fields(top.name, *_groups(top.name, shared), header.data)
        return
    if len(own) != frames:
        raise top.error(
            "PerFrameFunctionalGroupsSequence",
            f"has {counted(len(own), 'item')}, expected {frames}",
        )
    common = _groups(top.name, shared)
    for index, item in enumerate(own):
        name = f"{top.name} frame {index}"
        yield Fields(name, *_groups(name, [item]), *common, header.data)


def _groups(name: str, items: list[Any]) -> list[Any]:
    """The data sets inside the functional groups that a CT frame is described by."""
    found = Fields(name, *items)
    return [group for keyword in GROUPS for group in found.items(keyword)[:1]]


def _every_frame(header: Header) -> list[Frame]:
    fields = header.fields
    _check_is_hu(fields)
    _check_colour(fields)
    layout = _layout(fields)
    _check_pixel_bytes(header, layout)
    many = _frame_fields(header, layout.frames)
    return [_frame(header, own, index, layout) for index, own in enumerate(many)]


def frames_of(header: Header) -> list[Frame]:
    """Every frame of a CT file, checked; call it inside `quiet`.

    Raises:
        SeriesError: an attribute is missing, malformed or out of range.
    """
    frames = header.once(_every_frame)
    if frames[0].file is header.file:
        return frames
    (first,) = frames  # of a file alike, which differs in its place in the patient and its bytes
    _check_pixel_bytes(header, first.layout)
    return [first.moved(header.file, _position(header.fields))]


__all__ = ["EXPORT_AGAIN", "Frame", "PixelLayout", "Rescale", "Vector", "frames_of"]
