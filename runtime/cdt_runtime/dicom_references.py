"""What a report has to repeat of the images that it refers to, taken from their headers.

It holds the patient's name: it goes into DICOM reports, and nowhere else.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

KEYWORDS = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"),
    *("SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows", "Columns"),
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    *("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
)


def read_reference(path: Path) -> dict[str, Any]:
    """Read the header of one file; call it inside `quiet`.

    Returns:
        Its KEYWORDS in DICOM's JSON; what can't be read is left out.
    """
    import pydicom

    data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(KEYWORDS), force=True)
    found: dict[str, Any] = {}
    for keyword in KEYWORDS:
        with suppress(Exception):  # any kind: pydicom converts on access, from bytes of any content
            element = data[keyword]
            found[keyword] = element.to_json_dict(None, 0)
    return found
