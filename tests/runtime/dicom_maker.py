"""Small synthetic CT series, written with pydicom: what the tests of the reader are fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs as codecs
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)

CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CLASS = "1.2.840.10008.5.1.4.1.1.2.1"
SERIES, STUDY = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
PATIENT = "SECRET^NAME"
"""Stands in every file; no message may ever hold it."""
ROWS, COLUMNS, GAP = 6, 8, 2.5

Change = Callable[[Dataset, int], Any]


def values(index: int) -> np.ndarray:
    """`(ROWS, COLUMNS)` int16 HU that tell slice, row and column apart, air and bone among them."""
    grid = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    return (grid * 40 - 1000 + index).astype(np.int16)


def data_set(index: int, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    """An axial slice `index` gaps above the origin, signed 16 bits, HU as stored."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CT_CLASS
    meta.MediaStorageSOPInstanceUID = f"{SERIES}.{index + 1}"
    ds = FileDataset(
        "",
        {},
        file_meta=meta,
        preamble=b"\0" * 128,
        is_implicit_VR=syntax == ImplicitVRLittleEndian,
        is_little_endian=syntax != ExplicitVRBigEndian,
    )
    ds.SOPClassUID, ds.SOPInstanceUID = CT_CLASS, f"{SERIES}.{index + 1}"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality = "CT"
    ds.PatientName = ds.PatientID = PATIENT
    ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, SERIES
    ds.SeriesDescription = PATIENT
    ds.ImagePositionPatient = [-10, -20, 100 + GAP * index]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [0.75, 0.5]
    ds.SliceThickness = GAP
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    set_pixels(ds, values(index))
    return ds


def set_pixels(ds: Dataset, cells: np.ndarray) -> None:
    """Uncompressed pixels in the byte order of the file."""
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    ds.PixelData = cells.astype(cells.dtype.newbyteorder(">" if big else "<")).tobytes()
    ds["PixelData"].VR = "OW"


def set_compressed(ds: Dataset, syntax: str, *streams: bytes) -> None:
    """Encapsulated pixels, one stream a frame."""
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(list(streams))
    ds["PixelData"].VR = "OB"


def save(ds: Dataset, path: Path) -> Path:
    """Writes the file as its transfer syntax says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = ds.file_meta.TransferSyntaxUID
    implicit, little = uid == ImplicitVRLittleEndian, uid != ExplicitVRBigEndian
    ds.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    return path


def write_series(
    folder: Path, count: int = 8, change: Change | None = None, syntax: str = ExplicitVRLittleEndian
) -> list[Path]:
    """`count` slices with names in reverse order; `change(ds, index)` alters each of them."""
    paths = []
    for index in range(count):
        ds = data_set(index, syntax)
        if change is not None:
            change(ds, index)
        paths.append(save(ds, folder / f"{count - index:03d}.dcm"))
    return paths


def item(**attributes: Any) -> Dataset:
    """A data set of these attributes."""
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def enhanced(count: int = 8) -> FileDataset:
    """The same series as one Enhanced file; frame 0 is the highest slice."""
    ds = data_set(0)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_CLASS
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    del ds.RescaleSlope, ds.RescaleIntercept, ds.SliceThickness
    measures = item(PixelSpacing=[0.75, 0.5], SliceThickness=GAP)
    plane = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    ds.SharedFunctionalGroupsSequence = Sequence(
        [
            item(
                PixelMeasuresSequence=Sequence([measures]),
                PlaneOrientationSequence=Sequence([plane]),
            )
        ]
    )
    order = list(reversed(range(count)))
    ds.PerFrameFunctionalGroupsSequence = Sequence([_frame_group(index) for index in order])
    ds.NumberOfFrames = count
    # Slice `index` is stored as half its value less `index`: the scale differs from frame to frame.
    set_pixels(ds, np.stack([(values(index) - index) // 2 for index in order]).astype(np.int16))
    return ds


def _frame_group(index: int) -> Dataset:
    place = item(ImagePositionPatient=[-10, -20, 100 + GAP * index])
    scale = item(RescaleSlope=2, RescaleIntercept=index, RescaleType="HU")
    return item(
        PlanePositionSequence=Sequence([place]),
        PixelValueTransformationSequence=Sequence([scale]),
    )


TRUTH = np.maximum(np.stack([values(i) for i in range(8)]).astype(np.float32), -1024)


def every(**attributes: Any) -> Change:
    """Sets attributes in every slice."""
    return lambda ds, index: [setattr(ds, k, v) for k, v in attributes.items()]


def only(number: int, **attributes: Any) -> Change:
    """Sets attributes in one slice."""
    return lambda ds, index: index == number and every(**attributes)(ds, index)


def without(*keywords: str) -> Change:
    def change(ds: Any, index: int) -> None:
        for keyword in keywords:
            delattr(ds, keyword)

    return change


def positions(*z: float) -> Change:
    return lambda ds, index: setattr(ds, "ImagePositionPatient", [-10, -20, z[index]])


def rle(cells: np.ndarray) -> bytes:
    """One frame as PS3.5 annex G writes it: the high bytes, then the low bytes."""
    planes = [codecs.packbits_encode(cells.astype(">i2").tobytes()[plane::2]) for plane in (0, 1)]
    planes = [plane + b"\0" * (len(plane) % 2) for plane in planes]
    offsets = [2, 64, 64 + len(planes[0])] + [0] * 13
    return np.array(offsets, "<u4").tobytes() + b"".join(planes)


def compressed(stream: bytes, syntax: str = JPEGLSLossless) -> Change:
    return lambda ds, index: set_compressed(ds, syntax, stream)
