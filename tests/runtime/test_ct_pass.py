"""Slices summed as whole numbers: exact whatever they hold, and whoever reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from both_ways import read_series
from dicom_maker import every, set_pixels, write_series

from cdt_runtime import ct_pass, parallel
from cdt_runtime.ct import load_reduced, scan_series
from cdt_runtime.ct_pass import batches_of, slice_shares
from cdt_runtime.ct_reduce import Reducer
from cdt_runtime.dicom_pixels import cells_of
from cdt_runtime.errors import SeriesError
from cdt_runtime.parallel import side_by_side

SIDE = 16
"""Of the slices; reduced to 4 x 4 their blocks are those of 512 x 512 reduced to 128 x 128."""

STORED = {
    "12 bits": ((0, 4096), np.uint16, {"BitsStored": 12, "HighBit": 11}),
    "12 bits, unused ones set": ((0, 1 << 16), np.uint16, {"BitsStored": 12, "HighBit": 11}),
    "signed 12 bits, unused ones set": (
        (-(1 << 15), 1 << 15),
        np.int16,
        {"BitsStored": 12, "HighBit": 11},
    ),
    "16 bits": ((0, 1 << 16), np.uint16, {}),
    "signed 16 bits": ((-(1 << 15), 1 << 15), np.int16, {}),
    "metal": ((-1024, 12000), np.int16, {}),
    "below air": ((-3000, 1000), np.int16, {"RescaleIntercept": -100}),
    "padding": ((-2000, 3071), np.int16, {"PixelPaddingValue": -2000}),
    "half steps": ((-1024, 3071), np.int16, {"RescaleSlope": 0.5}),
    "half steps below air": ((-4000, 3071), np.int16, {"RescaleSlope": 0.5}),
    "air between two values": ((-4000, 3071), np.int16, {"RescaleIntercept": 0.25}),
}


def series_of(folder: Path, name: str, seed: int = 0) -> None:
    """Eight slices that hold both ends of a range, and noise between them."""
    (low, high), dtype, attributes = STORED[name]
    rng = np.random.default_rng(seed)

    def change(ds: Any, index: int) -> None:
        pixels = rng.integers(low, high, (SIDE, SIDE)).astype(dtype)
        pixels[:4, :4], pixels[-4:, -4:] = low, high - 1
        set_pixels(ds, pixels)
        ds.Rows = ds.Columns = SIDE
        ds.PixelRepresentation = int(np.dtype(dtype).kind == "i")
        every(**attributes)(ds, index)

    write_series(folder, change=change)


@pytest.mark.parametrize("name", STORED)
def test_means_are_those_of_the_volume(name: str, tmp_path: Path) -> None:
    series_of(tmp_path, name)
    volume = read_series(tmp_path)
    blocks = volume.hu.astype(np.float64).reshape(2, 4, 4, 4, 4, 4)
    found = load_reduced(scan_series(tmp_path), (2, 4, 4))
    np.testing.assert_allclose(found, blocks.mean(axis=(1, 3, 5)), rtol=0, atol=0.01)


def test_whole_numbers_do_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only air between two stored values, met by a value below it, needs floats."""
    calls: list[str] = []
    monkeypatch.setattr(
        "cdt_runtime.ct_reduce.hu_of", lambda cells, frame: calls.append("float") or cells * 1.0
    )
    for name in STORED:
        series_of(tmp_path / name, name)
        calls.append(name)
        load_reduced(scan_series(tmp_path / name), (2, 4, 4))
    names = [name for name, then in pairwise(calls) if then == "float" != name]
    assert names == ["air between two values"]


def test_slices_of_other_scales_are_not_summed_together(tmp_path: Path) -> None:
    write_series(tmp_path, change=lambda ds, i: setattr(ds, "RescaleIntercept", i // 3))
    series = scan_series(tmp_path)
    batches = batches_of(series.frames, slice_shares(series.geometry, 8, 1))
    assert [len(batch.frames) for batch in batches] == [3, 3, 2]
    read_series(tmp_path)  # holds the means against the volume


def test_slices_that_count_in_two_output_slices_are_not_summed_with_others(tmp_path: Path) -> None:
    write_series(tmp_path)
    series = scan_series(tmp_path)
    shares = slice_shares(series.geometry, 8, 3)
    assert [len(batch.frames) for batch in batches_of(series.frames, shares)] == [2, 1, 2, 1, 2]


def test_a_batch_holds_no_more_than_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path)
    series = scan_series(tmp_path)
    shares = slice_shares(series.geometry, 8, 1)
    for room, sizes in ((1, [1] * 8), (3, [3, 3, 2]), (99, [8])):
        monkeypatch.setattr(ct_pass, "BATCH_BYTES", room * series.frames[0].layout.frame_bytes)
        assert [len(batch.frames) for batch in batches_of(series.frames, shares)] == sizes


def test_the_number_of_threads_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series_of(tmp_path, "half steps")
    series, found = scan_series(tmp_path), []
    for cores in (1, 2, 5):
        monkeypatch.setattr(parallel, "available_cores", lambda cores=cores: cores)
        found.append(load_reduced(series, (3, 5, 5)).tobytes())
    assert len({*found}) == 1


def test_a_disk_that_gives_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series_of(tmp_path, "metal")
    series = scan_series(tmp_path)
    expected = load_reduced(series, (2, 4, 4))

    class Slow(io.FileIO):
        def readinto(self, room: Any) -> int:
            return super().readinto(memoryview(room)[:100])

    monkeypatch.setattr("cdt_runtime.dicom_pixels.open_raw", lambda file: Slow(file.path))
    np.testing.assert_array_equal(load_reduced(series, (2, 4, 4)), expected)


def test_a_disk_that_gives_less_than_the_file_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series_of(tmp_path, "metal")
    series = scan_series(tmp_path)
    monkeypatch.setattr("cdt_runtime.dicom_pixels.open_raw", lambda file: io.BytesIO())
    with pytest.raises(SeriesError, match=r"^file 8 of 8 \(008\.dcm\): the pixels are cut short: "):
        load_reduced(series, (2, 4, 4))


def test_memory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    series_of(tmp_path, "below air")
    frame = scan_series(tmp_path).frames[0]
    payload = Path(frame.file.path).read_bytes()[frame.file.offset :]
    cells = cells_of(payload, frame)
    before = cells.copy()
    means, lowest = Reducer(4).means(cells, frame)
    np.testing.assert_array_equal(cells, before)
    assert (means.min(), lowest) == (-1024, -1024)


class TestSideBySide:
    def test_each_item_is_taken_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parallel, "available_cores", lambda: 4)
        taken: list[list[int]] = []

        def worker() -> Callable[[int], None]:
            taken.append([])
            return taken[-1].append

        side_by_side(worker, range(1000), most=3)
        assert len(taken) == 3
        assert sorted(item for items in taken for item in items) == list(range(1000))

    @pytest.mark.parametrize("cores", [1, 4])
    def test_the_first_error_is_raised_and_the_rest_left(
        self, cores: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parallel, "available_cores", lambda: cores)
        done: list[int] = []

        def do(item: int) -> None:
            if item >= 5:
                raise IndexError(item)
            done.append(item)

        with pytest.raises(IndexError, match=r"^5$"):
            side_by_side(lambda: do, range(100_000), most=8)
        assert sorted(done) == list(range(5))

    def test_nothing_to_do(self) -> None:
        side_by_side(lambda: pytest.fail, [], most=8)
