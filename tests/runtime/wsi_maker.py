"""Slides in DICOM for tests: VL Whole Slide Microscopy, a file a level, whose pixels are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_wsi(
    folder: Path,
    pixels: NDArray[np.uint8],
    mpp: float,
    *,
    levels: int = 3,
    tile: int = 64,
    jpeg: bool = False,
    patient: str = "Doe^Wsi",
    seed: str = "slide",
) -> Path:
    """Write the levels of a slide, each half the size of the one above.

    Args:
        folder: to make.
        pixels: `(H, W, 3)`.
        mpp: microns a pixel of the finest.
        levels: how many.
        tile: pixels along a frame.
        jpeg: compress the frames with loss.
        patient: their name, and with it their ID.
        seed: of the UIDs.
    """
    folder.mkdir(parents=True)
    for step in range(levels):
        small = pixels[:: 2**step, :: 2**step]
        data = _level(small, mpp * 2**step, step, tile, jpeg, patient, seed)
        data.save_as(folder / f"level_{step}.dcm", enforce_file_format=True)
    return folder


def _level(
    pixels: NDArray[np.uint8], mpp: float, step: int, tile: int, jpeg: bool, patient: str, seed: str
) -> Dataset:
    height, width = pixels.shape[:2]
    down, across = -(-height // tile), -(-width // tile)
    padded = np.full((down * tile, across * tile, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    frames = [
        padded[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        for row in range(down)
        for column in range(across)
    ]
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = WSI, _uid(seed, f"level {step}")
    data.StudyInstanceUID, data.SeriesInstanceUID = _uid(seed, "study"), _uid(seed, "series")
    data.FrameOfReferenceUID, data.DimensionOrganizationType = _uid(seed, "place"), "TILED_FULL"
    data.PatientName, data.PatientID, data.PatientBirthDate = patient, patient, "19500101"
    data.PatientSex, data.StudyDate, data.StudyTime = "O", "20260101", "101010"
    data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = "1", "", ""
    data.Modality, data.SeriesNumber, data.InstanceNumber = "SM", 1, step + 1
    data.ContentDate, data.ContentTime = "20260101", "101010"
    data.AcquisitionDateTime = "20260101101010"
    data.Manufacturer = data.ManufacturerModelName = data.DeviceSerialNumber = "test"
    data.SoftwareVersions = "1"
    kind = "VOLUME", "RESAMPLED" if step else "NONE"
    data.ImageType = ["DERIVED" if step else "ORIGINAL", "PRIMARY", *kind]
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    data.Rows = data.Columns = tile
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.NumberOfFrames = len(frames)
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    data.TotalPixelMatrixFocalPlanes, data.NumberOfOpticalPaths = 1, 1
    data.ImagedVolumeWidth, data.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    data.ImagedVolumeDepth = 0.001
    data.VolumetricProperties, data.SpecimenLabelInImage = "VOLUME", "NO"
    data.BurnedInAnnotation, data.FocusMethod = "NO", "AUTO"
    data.ExtendedDepthOfField = "NO"
    data.LossyImageCompression = "01" if jpeg else "00"
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    data.TotalPixelMatrixOriginSequence = [origin]
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    path = Dataset()
    path.OpticalPathIdentifier = "0"
    path.IlluminationTypeCodeSequence = [_code("111744", "DCM", "Brightfield illumination")]
    path.IlluminationColorCodeSequence = [_code("414298005", "SCT", "Full Spectrum")]
    data.OpticalPathSequence = [path]
    data.ContainerIdentifier = "container"
    data.IssuerOfTheContainerIdentifierSequence = []
    data.ContainerTypeCodeSequence = [_code("433466003", "SCT", "Microscope slide")]
    data.AcquisitionContextSequence = []
    specimen = Dataset()
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "specimen", _uid(seed, "specimen")
    specimen.IssuerOfTheSpecimenIdentifierSequence = []
    specimen.SpecimenPreparationSequence = []
    data.SpecimenDescriptionSequence = [specimen]
    data.file_meta = FileMetaDataset()
    if jpeg:
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        coded = [imagecodecs.jpeg8_encode(frame, level=95, subsampling="422") for frame in frames]
        data.PixelData = encapsulate(coded)
        data["PixelData"].is_undefined_length = True
    else:
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.PixelData = b"".join(frame.tobytes() for frame in frames)
    return data


def _uid(seed: str, what: str) -> str:
    return str(generate_uid(entropy_srcs=[seed, what]))


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code: Any = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code
