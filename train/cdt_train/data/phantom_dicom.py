"""Phantom CT as DICOM files, as a scanner of the year 2000 would name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cdt_train.data.phantom_ct import SLICE_MM

_DATE = "20000101"


def write_series(
    folder: Path, hu: NDArray[np.int16], pixel_mm: float, patient: str, seed: int
) -> None:
    """Writes one file a slice, numbered from the head to the feet.

    Args:
        folder: Created.
        hu: `(D, H, W)` Hounsfield units, the slice nearest the head first.
        pixel_mm: Distance of rows and of columns.
        patient: Goes into the name, the number and every UID.
        seed: Goes into every UID, so that two data sets never share one.
    """
    folder.mkdir(parents=True)
    top = (len(hu) - 1) / 2 * SLICE_MM
    for index, image in enumerate(hu):
        dataset = _series(patient, seed)
        _pixels(dataset, image.shape, pixel_mm)
        _place(dataset, index, top - index * SLICE_MM, pixel_mm)
        dataset.SOPInstanceUID = _uid(seed, patient, "instance", str(index))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.PixelData = (image.astype(np.int32) + 1024).astype("<u2").tobytes()
        dataset.save_as(folder / f"1-{index + 1:03d}.dcm", enforce_file_format=True)


def _uid(seed: int, *words: str) -> str:
    return str(generate_uid(entropy_srcs=["cdt-edge phantom", str(seed), *words]))


def _series(patient: str, seed: int) -> Dataset:
    """What every slice of a series shares."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID = CTImageStorage
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality = "CT"
    dataset.Manufacturer = "CDT Edge phantom"
    dataset.SeriesDescription = "PHANTOM CHEST 5 mm"
    dataset.PatientName = f"PHANTOM^{patient}"
    dataset.PatientID = patient
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = _DATE
    dataset.StudyTime = dataset.SeriesTime = "120000"
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.PatientPosition = "HFS"
    dataset.BodyPartExamined = "CHEST"
    dataset.KVP = "120"
    dataset.ConvolutionKernel = "STANDARD"
    dataset.SeriesNumber = 1
    dataset.AcquisitionNumber = 1
    dataset.StudyInstanceUID = _uid(seed, patient, "study")
    dataset.SeriesInstanceUID = _uid(seed, patient, "series")
    dataset.FrameOfReferenceUID = _uid(seed, patient, "frame")
    dataset.PositionReferenceIndicator = ""
    return dataset


def _pixels(dataset: Dataset, shape: tuple[int, ...], pixel_mm: float) -> None:
    dataset.Rows, dataset.Columns = shape
    dataset.PixelSpacing = [pixel_mm, pixel_mm]
    dataset.SliceThickness = dataset.SpacingBetweenSlices = SLICE_MM
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 16
    dataset.BitsStored = 12
    dataset.HighBit = 11
    dataset.PixelRepresentation = 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.WindowCenter, dataset.WindowWidth = [40, -600], [400, 1500]


def _place(dataset: Dataset, index: int, z: float, pixel_mm: float) -> None:
    top, left = (round(-(side - 1) / 2 * pixel_mm, 4) for side in (dataset.Rows, dataset.Columns))
    dataset.InstanceNumber = index + 1
    dataset.ImagePositionPatient = [left, top, z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SliceLocation = z
