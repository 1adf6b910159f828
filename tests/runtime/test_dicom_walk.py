"""The walk over a header: the values of a full parse, or none at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dicom_maker import data_set, item, save
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from cdt_runtime.dicom_header import SYNTAXES, Fields, Header, _parse, read_header
from cdt_runtime.dicom_quiet import quiet
from cdt_runtime.dicom_walk import ABSENT, CHUNK, KEYWORDS, Unusual, Walked, walk
from cdt_runtime.errors import SeriesError

TEXTS = ("ImageType", "SOPClassUID", "Modality", "PatientName", "PatientID", "SeriesInstanceUID")
TEXTS += ("PhotometricInterpretation", "RescaleType")
FOLDERS = ("dicom_odd", "dicom_malformed", "ct/totalseg/example_ct_dicom")


def header(path: Path, monkeypatch: pytest.MonkeyPatch, *, walked: bool) -> Any:
    """The header, or the message of the error."""
    with quiet(), monkeypatch.context() as patched:
        if not walked:
            patched.setattr("cdt_runtime.dicom_header.walk", refuse)
        try:
            return read_header(path, "x")
        except SeriesError as error:
            return str(error)


def refuse(*_: object) -> Walked:
    raise Unusual


READS: dict[str, Callable[[Fields, str], Any]] = {
    "text": lambda fields, keyword: fields.text(keyword) if keyword in TEXTS else None,
    "number": lambda fields, keyword: fields.number(keyword),
    "three numbers": lambda fields, keyword: fields.numbers(keyword, 3),
    "integer": lambda fields, keyword: fields.integer(keyword, 0),
    "stored value": lambda fields, keyword: fields.stored_value(keyword, True),
}


def of(fields: Fields, keyword: str, name: str) -> Any:
    """A value in one way to read it, or what is wrong with it."""
    try:
        return READS[name](fields, keyword)
    except SeriesError as error:
        return str(error)


def facts(found: Header) -> dict[str, Any]:
    """All that readers of a header make of it; errors as their message."""
    made: dict[str, Any] = {"file": repr(found.file), "tag": found.pixel_tag}
    made |= {"directory": found.is_directory, "patient": found.patient()}
    for keyword in KEYWORDS:
        made |= {f"{keyword} as {name}": of(found.fields, keyword, name) for name in READS}
    made |= {keyword: found.fields.get(keyword) for keyword in ABSENT}
    made["ImageType as words"] = found.fields.words("ImageType")
    return made


def test_every_real_file_has_the_values_of_a_full_parse(
    real_data: Path, chest_series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [path for name in FOLDERS for path in sorted((real_data / name).rglob("*"))]
    walked = 0
    for path in [*filter(Path.is_file, files), *sorted(chest_series.glob("*.dcm"))]:
        fast = header(path, monkeypatch, walked=True)
        whole = header(path, monkeypatch, walked=False)
        if isinstance(fast, Header):
            walked += isinstance(fast.data, Walked)
            assert facts(fast) == facts(whole), path.name
        else:
            assert fast == whole, path.name
    assert walked >= 64 + 20  # both series, and some of the odd ones


def change(**attributes: Any) -> bytes:
    """A file of ours with some attributes changed."""
    ds = data_set(0)
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("attributes", "walked"),
    [
        ({}, True),
        ({"PatientName": "Häßler", "SpecificCharacterSet": "ISO_IR 192"}, False),
        ({"ModalityLUTSequence": Sequence([item(LUTExplanation="x")])}, False),
        ({"ReferencedImageSequence": Sequence([item(ReferencedSOPInstanceUID="1.2")])}, True),
        ({"ICCProfile": bytes(3 * CHUNK)}, True),  # pixels lie beyond the first bytes read
        ({"RescaleSlope": ""}, True),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, True),
        ({"SliceThickness": "2.5 "}, True),
    ],
)
def test_what_the_walk_takes_and_what_it_leaves_to_a_full_parse(
    attributes: dict[str, Any], walked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(change(**attributes))
    fast = header(path, monkeypatch, walked=True)
    assert isinstance(fast.data, Walked) == walked
    assert facts(fast) == facts(header(path, monkeypatch, walked=False))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_never_read_otherwise_than_by_a_full_parse(data: st.DataObject) -> None:
    good = change()
    place = data.draw(st.integers(132, len(good) - 100))
    bad = good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :]
    start = good.find(b"\x08\x00\x08\x00CS")
    assert walk(io.BytesIO(good), start, len(good)).get("Modality") == "CT"
    try:
        found = walk(io.BytesIO(bad), start, len(bad))
    except Unusual:
        return
    stream = io.BytesIO(bad)
    stream.seek(start)
    with quiet():
        whole, stop = _parse(stream, SYNTAXES[ExplicitVRLittleEndian], "x")
        assert (found.pixel_tag, found.pixel_length) == (stop.tag, stop.length)
        assert found.pixel_offset == stream.tell() + stop.header_bytes
        fast, slow = Fields("x", found), Fields("x", whole)
        for keyword in KEYWORDS:
            for name in READS:
                assert of(fast, keyword, name) == of(slow, keyword, name)


def test_a_file_that_ends_before_its_pixels_is_left_to_a_full_parse(tmp_path: Path) -> None:
    ds = data_set(0)
    del ds.PixelData
    path = save(ds, tmp_path / "a.dcm")
    with path.open("rb") as stream, pytest.raises(Unusual):
        walk(stream, path.read_bytes().find(b"\x08\x00\x08\x00CS"), path.stat().st_size)
