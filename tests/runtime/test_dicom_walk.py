"""The walk over a header, and layouts of those walked over: the values of a full parse, or none."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dicom_maker import (
    COLUMNS,
    PATIENT,
    ROWS,
    data_set,
    every,
    item,
    save,
    set_compressed,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from cdt_runtime.ct import scan_series
from cdt_runtime.dicom_alike import MOST_LAYOUTS, Layouts
from cdt_runtime.dicom_fields import Fields
from cdt_runtime.dicom_header import Header, _parse, read_header
from cdt_runtime.dicom_quiet import quiet
from cdt_runtime.dicom_syntax import SYNTAXES
from cdt_runtime.dicom_walk import ABSENT, CHUNK, KEYWORDS, Unusual, Walked, walk
from cdt_runtime.errors import SeriesError

LITTLE = SYNTAXES[ExplicitVRLittleEndian]
TEXTS = ("ImageType", "SOPClassUID", "Modality", "PatientName", "PatientID", "SeriesInstanceUID")
TEXTS += ("PhotometricInterpretation", "RescaleType")
FOLDERS = ("dicom_odd", "dicom_malformed", "ct/totalseg/example_ct_dicom")


def header(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, walked: bool, layouts: Layouts | None = None
) -> Any:
    """The header, or the message of the error."""
    with quiet(), monkeypatch.context() as patched:
        if not walked:
            patched.setattr("cdt_runtime.dicom_header.walk", refuse)
        try:
            return read_header(str(path), "x", layouts or Layouts())
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
    walked, alike, layouts = 0, 0, Layouts()
    for path in [*filter(Path.is_file, files), *sorted(chest_series.glob("*.dcm"))]:
        whole = header(path, monkeypatch, walked=False)
        fast = header(path, monkeypatch, walked=True)
        by_layouts = [header(path, monkeypatch, walked=True, layouts=layouts) for _ in range(2)]
        if isinstance(fast, Header):
            walked += isinstance(fast.data, Walked)
            alike += layouts.find(path.read_bytes()[: layouts.reach]) is not None
            assert facts(fast) == facts(whole), path.name
            assert [facts(found) for found in by_layouts] == 2 * [facts(whole)], path.name
        else:
            assert [fast, *by_layouts] == 3 * [whole], path.name
    assert walked >= 64 + 20  # both series, and some of the odd ones
    assert alike == walked


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
    bad = damaged(data, good)
    start = good.find(b"\x08\x00\x08\x00CS")
    assert walk(io.BytesIO(good), start, len(good)).get("Modality") == "CT"
    try:
        found = walk(io.BytesIO(bad), start, len(bad))
    except Unusual:
        return
    assert_as_parsed(found, bad, start)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nor_are_they_by_the_layout_of_the_file_before(data: st.DataObject) -> None:
    good = change()
    start = good.find(b"\x08\x00\x08\x00CS")
    layouts = Layouts()
    layouts.keep(io.BytesIO(good), start, LITTLE, walk(io.BytesIO(good), start, len(good)))
    for content in (damaged(data, good), damaged(data, good), good):
        found = layouts.find(content)
        assert found or content is not good
        if found:
            assert found[0].start == start
            assert_as_parsed(found[1], content, start)


def damaged(data: st.DataObject, good: bytes) -> bytes:
    """One byte of the header changed."""
    place = data.draw(st.integers(132, len(good) - 100))
    return good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :]


def assert_as_parsed(found: Walked, content: bytes, start: int) -> None:
    stream = io.BytesIO(content)
    stream.seek(start)
    with quiet():
        whole, stop = _parse(stream, LITTLE, "x")
        assert (found.pixel_tag, found.pixel_length) == (stop.tag, stop.length)
        assert found.pixel_offset == stream.tell() + stop.header_bytes
        fast, slow = Fields("x", found), Fields("x", whole)
        for keyword in KEYWORDS:
            for name in READS:
                assert of(fast, keyword, name) == of(slow, keyword, name)


@pytest.mark.parametrize(
    "attributes",
    [
        {"RescaleIntercept": -1000},  # a value that files alike have in common
        {"PatientName": "Häßler^Ä", "PatientID": PATIENT},  # as long, and not ASCII
        {"Modality": "MR"},
        {"BitsStored": 12, "HighBit": 11},
        {"ImagePositionPatient": [-10, -20]},
        {"PixelData": bytes(ROWS * COLUMNS * 2 - 2)},
    ],
)
def test_a_file_laid_out_alike_that_differs_in_one_value(
    attributes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layouts = tmp_path / "a.dcm", Layouts()
    for content in (change(), change(**attributes), change()):
        path.write_bytes(content)
        alike = header(path, monkeypatch, walked=True, layouts=layouts)
        assert facts(alike) == facts(header(path, monkeypatch, walked=False))


def test_another_transfer_syntax_is_never_taken_for_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90")
    layouts = Layouts()
    for uid in (*uids, *uids):
        ds = data_set(0)
        set_compressed(ds, uid, b"\xff\xd8\xff\xd9")
        path = save(ds, tmp_path / "a.dcm")
        assert header(path, monkeypatch, walked=True, layouts=layouts).file.syntax == SYNTAXES[uid]


def test_more_layouts_than_are_kept(tmp_path: Path) -> None:
    count = 2 * MOST_LAYOUTS + 2
    write_series(tmp_path, count, lambda ds, i: setattr(ds, "PatientComments", "x" * 2 * i))
    assert len(scan_series(tmp_path).frames) == count


def test_layouts_of_files_that_change_by_turns_are_all_used(tmp_path: Path) -> None:
    layouts = Layouts()
    paths = write_series(tmp_path, 9, lambda ds, i: setattr(ds, "PatientComments", "xx" * (i % 3)))
    with quiet():
        headers = [read_header(str(path), "x", layouts) for path in paths]
    memos = [found.data.memo for found in headers if found]
    assert all(memos[i] is memos[i % 3] for i in range(9))
    assert len({*map(id, memos)}) == 3


def test_pixels_that_begin_beyond_the_bytes_read_at_first(tmp_path: Path) -> None:
    layouts = Layouts()
    paths = write_series(tmp_path, 3, every(ICCProfile=bytes(3 * CHUNK)))
    with quiet():
        headers = [read_header(str(path), "x", layouts) for path in paths]
    assert layouts.reach > 3 * CHUNK
    assert len({id(found.data.memo) for found in headers if found}) == 1


def test_a_file_that_ends_before_its_pixels_is_left_to_a_full_parse(tmp_path: Path) -> None:
    ds = data_set(0)
    del ds.PixelData
    path = save(ds, tmp_path / "a.dcm")
    with path.open("rb") as stream, pytest.raises(Unusual):
        walk(stream, path.read_bytes().find(b"\x08\x00\x08\x00CS"), path.stat().st_size)
