"""A compressed frame in its fragments: what pydicom makes of them, or it is asked."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from dicom_maker import rle, set_compressed, values, write_series
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import RLELossless

from cdt_runtime.ct import load_reduced, scan_series
from cdt_runtime.dicom_pixels import ITEM, LAST_ITEM, _only_frame

END = LAST_ITEM + bytes(4)
"""What pydicom leaves off."""

ITEMS = st.tuples(
    st.sampled_from([ITEM, ITEM, ITEM, LAST_ITEM, b"\xfe\xff\x0d\xe0"]),
    st.sampled_from([0, 0, 0, 1, -1, 4, 0xFFFF_FFFF]),
    st.sampled_from([b"", bytes(4), bytes(8), b"abcd", b"xy"]),
)


def told(items: list[tuple[bytes, int, bytes]], rest: bytes) -> bytes:
    """Items with their lengths, of which some are wrong."""
    lengths = [max(0, min(0xFFFF_FFFF, len(value) + off)) for _, off, value in items]
    parts = zip(items, lengths, strict=True)
    return b"".join(tag + n.to_bytes(4, "little") + value for (tag, _, value), n in parts) + rest


@given(st.lists(ITEMS, max_size=5), st.sampled_from([b"", LAST_ITEM, END]))
@example([(ITEM, 0, b""), (ITEM, 0, b"ab"), (ITEM, 0, b"cd")], END)
@example([(ITEM, 0, bytes(4)), (ITEM, 0, b"ab")], END)
def test_what_is_taken_apart_here_is_what_pydicom_takes_apart(
    items: list[tuple[bytes, int, bytes]], rest: bytes
) -> None:
    data = told(items, rest)
    found = _only_frame(data)
    if found is not None:
        assert [found] == list(generate_frames(data, number_of_frames=1))


def test_plain_ones_are_taken_apart_here() -> None:
    for streams in ([b"abcd"], [b"ab", b"cd", b"ef"]):
        for table in (True, False):
            data = encapsulate([b"".join(streams)], len(streams), has_bot=table)
            data += END
            assert _only_frame(data) == b"".join(streams)


def test_every_real_file_gives_the_frame_that_pydicom_gives(real_data: Path) -> None:
    answered = 0
    for path in sorted((real_data / "dicom_odd").rglob("*")) + sorted(
        (real_data / "ct/totalseg/example_ct_dicom").iterdir()
    ):
        try:
            ds = pydicom.dcmread(path)
            data, frames = ds.PixelData + END, int(ds.get("NumberOfFrames", 1))
            if frames > 1 or not ds.file_meta.TransferSyntaxUID.is_encapsulated:
                continue
        except Exception:  # a folder, no DICOM, no pixels: no frame to be compared
            continue
        found = _only_frame(data)
        if found is not None:
            answered += 1
            assert [found] == list(generate_frames(data, number_of_frames=1)), path.name
    assert answered >= 20


def test_a_compressed_series_does_not_need_pydicom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path, change=lambda ds, i: set_compressed(ds, RLELossless, rle(values(i))))
    series = scan_series(tmp_path)
    monkeypatch.setattr("cdt_runtime.dicom_pixels.load_pydicom", lambda: pytest.fail("loaded"))
    assert load_reduced(series, (2, 2, 2)).shape == (2, 2, 2)
