"""What is said about each kind of CT series that can't be used: one row an input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_series import (
    FACE_ON,
    LS_STREAM,
    SIDE_ON,
    Bad,
    another,
    bomb,
    cut,
    emptied,
    enhanced_with_7_streams,
    j2k,
    patched,
    written,
)
from dicom_maker import (
    COLUMNS,
    GAP,
    ROWS,
    SERIES,
    compressed,
    every,
    item,
    only,
    positions,
    rle,
    set_pixels,
    values,
    without,
    write_series,
)
from pydicom import uid as uids
from pydicom.sequence import Sequence

from cdt_runtime.ct import read_series
from cdt_runtime.dicom_fields import Fields
from cdt_runtime.errors import SeriesError

BAD: dict[str, Bad] = {
    "no DICOM": Bad(
        r"no DICOM images in .*case \(1 file seen\): give the folder",
        after=lambda folder: (emptied(folder), written("notes.txt", b"hello")(folder)),
    ),
    "only a link": Bad(
        r"no DICOM images in .* \(0 files seen, 1 link not followed\)",
        after=lambda folder: (emptied(folder), (folder / "l").symlink_to(folder)),
    ),
    "DICM mark, no header": Bad(
        r"file 9 of 9 \(junk\): Modality is missing, the header may be cut short: copy it again",
        after=written("junk", bytes(128) + b"DICM"),
    ),
    "DICM mark, damaged meta": Bad(
        r"file 9 of 9 \(junk\): the file meta group is damaged",
        after=written("junk", bytes(128) + b"DICM\2\0\x10" + bytes(9)),
    ),
    "named .dcm but not": Bad(
        r"file 9 of 9 \(x\.dcm\): not a DICOM file in spite of its name",
        after=written("x.dcm", b"hello" * 99),
    ),
    "two series": Bad(
        rf"case holds 2 CT series: {SERIES} \(8 slices\), 1\.2\.3 \(1 slice\): choose one with "
        "--series UID",
        after=another(SeriesInstanceUID="1.2.3"),
    ),
    "series UID that is text": Bad(
        r"holds 2 CT series: .*\(no valid UID\) \(1 slice\)",
        change=lambda ds, i: i == 0 and delattr(ds, "SeriesInstanceUID"),
    ),
    "series not there": Bad(
        rf"does not hold the series asked for; it holds {SERIES} \(8 slices\)",
        options={"series_uid": "1.2.3"},
    ),
    "two patients": Bad(
        r"case holds 2 patients \(PatientID differs between file 1 of 9 \(001\.dcm\) and "
        r"file 9 of 9 \(extra\.dcm\)\): keep one patient a folder",
        after=another(PatientID="SECRET^OTHER"),
        options={"series_uid": SERIES},
    ),
    "two patients by their names": Bad(
        r"case holds 2 patients \(PatientName differs between file 1 of 9 \(001\.dcm\) and ",
        after=another(PatientID="", PatientName="SECRET^OTHER"),
    ),
    "only localizers": Bad(
        r"no CT slices in .*, only 8 localizers: expected files whose Modality is CT",
        change=every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    ),
    "not CT": Bad(r"only 8 files of another modality: expected", change=every(Modality="MR")),
    "image type that is a number": Bad(
        r"003\.dcm\): ImageType is not text: export the series again",
        after=patched(
            b"\x08\0\x08\0CS\x16\0" + rb"ORIGINAL\PRIMARY\AXIAL",
            b"\x08\0\x08\0DS\x16\0" + b"1".ljust(22),
        ),
    ),
    "two orientations": Bad(
        r"005\.dcm\): ImageOrientationPatient differs from 4 other slices: keep one orientation",
        change=lambda ds, i: i > 3 and setattr(ds, "ImageOrientationPatient", FACE_ON),
    ),
    "one place, two images": Bad(
        r"file 5 of 9 \(005\.dcm\) and file 9 of 9 \(extra\.dcm\) lie at one position with "
        r"different pixels: give one phase",
        after=another(RescaleIntercept=1),
    ),
    "missing slices": Bad(
        r"slice gap 7\.5 mm at index 4, expected 2\.5 mm: find what is missing between "
        r"file 4 of 8 \(004\.dcm\) and file 3 of 8 \(003\.dcm\), or interpolate with "
        r"--allow-resample",
        change=positions(*(GAP * (i + 2 * (i > 4)) for i in range(8))),
    ),
    "gaps that drift": Bad(
        r"slice gap 1 mm at index 0, expected 1\.09 mm",
        change=positions(*(i if i < 20 else 19 + 1.09 * (i - 19) for i in range(40))),
        count=40,
    ),
    "slices far apart": Bad(
        r"slice spacing is 12 mm, expected 0\.05 to 10 mm: give the full series",
        change=positions(*(12 * i for i in range(8))),
    ),
    "slices far apart and uneven": Bad(
        r"slice spacing is 12 mm, expected 0\.05 to 10 mm: give the full series",
        change=positions(0, 12, 24, 30, 42, 54, 66, 78),
    ),
    "slices too near": Bad(
        r"slice spacing is 0\.003 mm, expected 0\.05 to 10 mm: export the series again",
        change=positions(*(0.003 * i for i in range(8))),
        options={"allow_resample": True},
    ),
    "a gap too wide to fill": Bad(
        r"slice gap 9e\+04 mm between file 2 of 8 \(002\.dcm\) and file 1 of 8 \(001\.dcm\) is too "
        r"wide to resample to 0\.05 mm",
        change=lambda ds, i: (
            positions(*(0.05 * i for i in range(7)), 9e4)(ds, i),
            every(Rows=32, Columns=32)(ds, i),
            set_pixels(ds, np.zeros((32, 32), np.int16)),
        ),
        options={"allow_resample": True},
    ),
    "a tilt that no gantry has": Bad(
        r"slice shifted sideways by 3\.57 mm at index 1, expected at most 0\.10 mm",
        change=lambda ds, i: setattr(
            ds, "ImagePositionPatient", [-10, -20 + GAP * i * np.tan(np.radians(55)), GAP * i]
        ),
    ),
    "a shifted slice": Bad(
        r"003\.dcm\): slice shifted sideways by 4\.00 mm at index 5, expected at most 0\.10 mm",
        change=only(5, ImagePositionPatient=[-14, -20, 100 + 5 * GAP]),
    ),
    "no position": Bad(
        r"001\.dcm\): ImagePositionPatient is missing, a CT slice needs it: export",
        change=without("ImagePositionPatient"),
    ),
    "no orientation": Bad(
        r"001\.dcm\): ImageOrientationPatient is missing", change=without("ImageOrientationPatient")
    ),
    "position of two numbers": Bad(
        r"ImagePositionPatient is not 3 finite numbers", change=only(5, ImagePositionPatient=[1, 2])
    ),
    "no rescale, unsigned": Bad(
        r"RescaleSlope is missing and the stored values are unsigned, so they can't be HU",
        change=lambda ds, i: (
            without("RescaleSlope", "RescaleIntercept")(ds, i),
            setattr(ds, "PixelRepresentation", 0),
        ),
    ),
    "no rescale, no value below zero": Bad(
        r"008\.dcm\): RescaleIntercept is missing and no value lies below 0, so they can't be HU",
        change=lambda ds, i: (
            without("RescaleIntercept")(ds, i),
            set_pixels(ds, values(i) + 1100),
        ),
    ),
    "slope zero": Bad(r"RescaleSlope is 0, expected 1e-6 to 1000", change=only(2, RescaleSlope=0)),
    "intercept of a million": Bad(
        r"RescaleIntercept is 1e\+06, expected within 1e5", change=every(RescaleIntercept=1000000)
    ),
    "another unit": Bad(r"RescaleType names another unit than HU", change=every(RescaleType="ED")),
    "perfusion map": Bad(
        r"ImageType says PERFUSION, these values are not HU: give the source CT series",
        change=every(ImageType=["DERIVED", "PRIMARY", "PERFUSION"]),
    ),
    "modality table": Bad(
        r"ModalityLUTSequence is a table, expected",
        change=every(ModalityLUTSequence=Sequence([item(ModalityLUTType="HU")])),
    ),
    "padding of 32 bits": Bad(
        r"003\.dcm\): PixelPaddingValue does not fit 16 bits",
        change=lambda ds, i: i == 5 and ds.add_new("PixelPaddingValue", "SL", 1 << 20),
    ),
    "MONOCHROME1": Bad(
        r"PhotometricInterpretation is MONOCHROME1, expected MONOCHROME2",
        change=every(PhotometricInterpretation="MONOCHROME1"),
    ),
    "palette": Bad(
        r"PhotometricInterpretation is not MONOCHROME2",
        change=every(PhotometricInterpretation="PALETTE COLOR"),
    ),
    "colour": Bad(r"SamplesPerPixel is not 1", change=every(SamplesPerPixel=3)),
    "Rows differ": Bad(
        r"003\.dcm\): Rows x Columns is 5 x 8, expected 6 x 8 as in the other slices: take",
        change=only(5, Rows=5),
    ),
    "spacing differs": Bad(
        r"003\.dcm\): PixelSpacing is 0\.75 x 0\.6 mm, expected 0\.75 x 0\.5 mm",
        change=only(5, PixelSpacing=[0.75, 0.6]),
    ),
    "spacing zero": Bad(
        r"003\.dcm\): PixelSpacing is 0 mm, expected 0\.05 to 10 mm",
        change=only(5, PixelSpacing=[0.75, 0]),
    ),
    "spacing negative": Bad(
        r"PixelSpacing is -1 mm, expected 0\.05 to 10 mm", change=every(PixelSpacing=[-1, 1])
    ),
    "spacing NaN": Bad(
        r"003\.dcm\): PixelSpacing is not 2 finite numbers",
        after=patched(rb"0.75\0.5", rb"0.75\nan"),
    ),
    "spacing infinite": Bad(
        r"003\.dcm\): PixelSpacing is not 2 finite", after=patched(rb"0.75\0.5", rb"0.75\inf")
    ),
    "spacing text": Bad(
        r"003\.dcm\): PixelSpacing (is not 2 finite|can't be read)",
        after=patched(rb"0.75\0.5", rb"SECRET\5"),
    ),
    "orientation not unit": Bad(
        r"ImageOrientationPatient has lengths 1\.0100 and 1\.0000 and dot product 0\.0000",
        change=only(5, ImageOrientationPatient=[1.01, 0, 0, 0, 1, 0]),
    ),
    "orientation not perpendicular": Bad(
        r"ImageOrientationPatient has lengths .* and dot product 0\.6000, expected unit vectors",
        change=every(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]),
    ),
    "coronal": Bad(
        r"the series is coronal, 90 degrees off axial, expected at most 45: give the axial series",
        change=every(ImageOrientationPatient=FACE_ON),
    ),
    "sagittal": Bad(
        r"the series is sagittal, 90 degrees off axial",
        change=every(ImageOrientationPatient=SIDE_ON),
    ),
    "too few": Bad(r"the series has 7 slices, expected at least 8: give the full series", count=7),
    "one is too few": Bad(r"the series has 1 slice, expected at least 8: give", count=1),
    "lone slice, no thickness": Bad(
        r"001\.dcm\): SliceThickness is missing, a lone slice needs it",
        change=without("SliceThickness"),
        count=1,
        options={"min_slices": 1},
    ),
    "zero bytes": Bad(
        r"file 4 of 9 \(004\): the file is empty: copy it again", after=written("004", b"")
    ),
    "pixels cut": Bad(
        r"003\.dcm\): the file ends 10 bytes before its pixels do: it is cut short, copy it again",
        after=cut("003.dcm", -10),
    ),
    "header cut": Bad(
        r"003\.dcm\): PixelData is missing, the file may be cut short", after=cut("003.dcm", -112)
    ),
    "preamble only": Bad(r"003\.dcm\): Modality is missing", after=cut("003.dcm", 132)),
    "pixels too few": Bad(
        r"PixelData is 96 bytes, expected 192 \(12 x 8 x 1 frames x 16 bits\)",
        change=every(Rows=12),
    ),
    "65535 x 65535": Bad(
        r"Rows is 65535, expected 1 to 4096", change=only(5, Rows=65535, Columns=65535)
    ),
    "two million frames": Bad(
        r"NumberOfFrames gives 96000000\d* voxels|PixelData is 96 bytes, expected 192000000 ",
        change=only(5, NumberOfFrames=2000000),
    ),
    "billions of voxels": Bad(
        r"NumberOfFrames gives 96000000000 voxels, expected 1 to 1073741824",
        change=only(5, NumberOfFrames=2000000000),
    ),
    "frames without groups": Bad(
        r"003\.dcm\): PerFrameFunctionalGroupsSequence has 0 items, expected 2",
        change=lambda ds, i: (
            i == 5 and (setattr(ds, "NumberOfFrames", 2), set_pixels(ds, np.stack([values(i)] * 2)))
        ),
    ),
    "bits": Bad(
        r"BitsStored is 17 with HighBit 16 and BitsAllocated 16",
        change=every(BitsStored=17, HighBit=16),
    ),
    "12 bits packed": Bad(
        r"BitsAllocated is 12, expected 8, 16 or 32",
        change=every(BitsAllocated=12, BitsStored=12, HighBit=11),
    ),
    "float pixels": Bad(
        r"PixelData holds floating-point values, expected integers",
        change=lambda ds, i: (
            delattr(ds, "PixelData"),
            setattr(ds, "FloatPixelData", bytes(4 * ROWS * COLUMNS)),
        ),
    ),
    "deflated bomb": Bad(
        r"003\.dcm\): the deflated data unpacks to more than 512 MB, the limit",
        after=bomb,
        syntax=uids.DeflatedExplicitVRLittleEndian,
    ),
    "deflated, cut": Bad(
        r"003\.dcm\): the deflated data is cut short",
        after=cut("003.dcm", -20),
        syntax=uids.DeflatedExplicitVRLittleEndian,
    ),
    "unknown syntax": Bad(
        r"transfer syntax 1\.2\.840\.10008\.1\.2\.4\.100 is not supported: export the series as",
        change=compressed(b"\0\0\1\xb3", "1.2.840.10008.1.2.4.100"),
    ),
    "compressed, not so named": Bad(
        r"003\.dcm\): PixelData does not agree with the transfer syntax",
        change=compressed(LS_STREAM),
        after=patched(b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.1\0\0\0"),
    ),
    "stream without header": Bad(
        r"the JPEG-LS stream has no frame header", change=compressed(b"\xff\xd8\xff\xd9")
    ),
    "stream of another size": Bad(
        r"the compressed image is 9 x 8 x 1, Rows x Columns say 6 x 8 x 1",
        change=compressed(j2k(9, 8), uids.JPEG2000Lossless),
    ),
    "stream cut": Bad(
        r"the JPEG-LS stream is cut short: copy the file again", change=compressed(LS_STREAM[:-8])
    ),
    "stream damaged": Bad(
        r"the JPEG-LS pixels can't be decoded",
        change=compressed(LS_STREAM[:-60] + b"\xff" * 58 + LS_STREAM[-2:]),
    ),
    "RLE cut": Bad(
        r"the RLE pixels can't be decoded",
        change=compressed(rle(values(0))[:100], uids.RLELossless),
    ),
    "frames too few": Bad(
        r"\(extra\): 7 compressed frames, NumberOfFrames says 8: copy the file again",
        after=enhanced_with_7_streams,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, folder = BAD[case], tmp_path / "case"
    write_series(folder, bad.count, bad.change, bad.syntax)
    if bad.after is not None:
        bad.after(folder)
    with pytest.raises(SeriesError, match=bad.says) as caught:
        read_series(folder, **bad.options)
    message = str(caught.value)
    assert "\n" not in message
    assert "SECRET" not in message
    assert "/" not in message
    assert not caplog.records


@pytest.mark.parametrize("value", [1.5, "text", b"bytes", [1, 2]])
def test_what_is_no_sequence_is_said(value: object) -> None:
    fields = Fields("file 1 of 1", {"PlanePositionSequence": value})
    with pytest.raises(SeriesError, match="PlanePositionSequence is not a sequence: export the s"):
        fields.items("PlanePositionSequence")
