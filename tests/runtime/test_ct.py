"""CT series made here: which files count, where each voxel lies, how the series is named."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from both_ways import read_series
from dicom_maker import (
    COLUMNS,
    GAP,
    PATIENT,
    ROWS,
    SERIES,
    TRUTH,
    compressed,
    data_set,
    every,
    item,
    positions,
    save,
    set_pixels,
    write_series,
)
from pydicom import uid as uids
from pydicom.sequence import Sequence

from cdt_runtime.ct import load_volume, scan_series
from cdt_runtime.errors import MissingDependencyError, SeriesError

AXES = [
    ([1, 0, 0], [0, 1, 0]),
    ([-1, 0, 0], [0, 1, 0]),
    ([1, 0, 0], [0, -1, 0]),
    ([-1, 0, 0], [0, -1, 0]),
    ([0, 1, 0], [1, 0, 0]),
    ([0, -1, 0], [1, 0, 0]),
    ([0, 1, 0], [-1, 0, 0]),
    ([0, -1, 0], [-1, 0, 0]),
    ([0.8, 0.6, 0], [-0.6, 0.8, 0]),
    ([1, 0, 0], [0, 0.8, 0.6]),
]


def field_at(points: np.ndarray) -> np.ndarray:
    """HU at LPS points `(..., 3)`: one that no flip or transpose leaves alone."""
    return points @ np.array([10.0, 30.0, 1.0])


@pytest.mark.parametrize(("row", "column"), AXES)
def test_every_voxel_lies_where_the_volume_says(
    row: list[float], column: list[float], tmp_path: Path
) -> None:
    r, c = np.array(row, float), np.array(column, float)
    normal = np.cross(r, c)

    def change(ds: Any, index: int) -> None:
        start = np.array([5.0, -7.0, 40.0]) + 3 * index * normal
        steps = np.arange(ROWS)[:, None, None] * 2 * c + np.arange(COLUMNS)[:, None] * 1 * r
        ds.ImagePositionPatient = [f"{v:.6f}" for v in start]
        ds.ImageOrientationPatient = [*row, *column]
        ds.PixelSpacing = [2, 1]
        ds.RescaleSlope = 0.125
        set_pixels(ds, np.rint(8 * field_at(start + steps)).astype(np.int16))

    write_series(tmp_path, change=change)
    volume = read_series(tmp_path)
    grid = np.stack(np.indices(volume.hu.shape), -1) * volume.spacing_mm
    points = volume.origin_mm + grid @ np.array(volume.direction)
    assert np.abs(volume.hu - field_at(points)).max() <= 1 / 16 + 1e-4
    assert np.diag(np.fliplr(np.array(volume.direction))).min() > 0.7


def test_order_comes_from_positions_not_from_names(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.InstanceNumber = (index * 5) % 8

    paths = write_series(tmp_path, change=change)
    for place, path in enumerate(paths):
        path.rename(tmp_path / f"{(place * 3) % 8}")
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_jitter_is_accepted(tmp_path: Path) -> None:
    write_series(tmp_path, change=positions(*(GAP * i + 0.08 * (-1) ** i for i in range(8))))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.spacing_mm[0] == pytest.approx(GAP, abs=0.03)


def test_jitter_of_an_eighth_of_a_millimetre_is_not(tmp_path: Path) -> None:
    write_series(tmp_path, change=positions(*(GAP * i + 0.125 * (-1) ** i for i in range(8))))
    with pytest.raises(SeriesError, match=r"slice gap 2\.75 mm at index 1, expected 2\.25 mm"):
        scan_series(tmp_path)


def test_a_slice_missing_from_a_fine_series_is_found(tmp_path: Path) -> None:
    write_series(tmp_path, change=positions(*(0.1 * (i + (i > 3)) for i in range(8))))
    with pytest.raises(SeriesError, match=r"slice gap 0\.2 mm at index 3, expected 0\.1 mm"):
        scan_series(tmp_path)


def test_resampling_uses_true_positions(tmp_path: Path) -> None:
    write_series(tmp_path, change=positions(0, 2, 4, 6, 8, 12, 14, 16))
    volume = read_series(tmp_path, allow_resample=True)
    assert volume.spacing_mm[0] == 2
    assert volume.warnings == ("slice gaps are uneven (2 to 4 mm): interpolated to 2 mm",)
    expected = np.insert(TRUTH, 5, (TRUTH[4] + TRUTH[5]) / 2, axis=0)
    np.testing.assert_array_equal(volume.hu, expected)


@pytest.mark.parametrize("degrees", [15, -20])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tilted_gantry_is_straightened(degrees: float, axis: int, tmp_path: Path) -> None:
    """What is a straight column in the room is one in the volume, to the last slice."""
    drift = GAP * np.tan(np.radians(degrees))
    spacing = (0.75, 0.5)[1 - axis]  # of rows and columns; axis 1 is down
    inside = np.arange(COLUMNS if axis == 0 else ROWS) * spacing

    def tilted(ds: Any, index: int) -> None:
        position = [-10.0, -20.0, 100 + GAP * index]
        position[axis] += drift * index
        ds.ImagePositionPatient = position
        room = position[axis] + inside
        cells = np.tile(room, (ROWS, 1)) if axis == 0 else np.tile(room[:, None], (1, COLUMNS))
        set_pixels(ds, np.rint(100 * cells).astype(np.int16))
        ds.RescaleSlope = 0.1

    write_series(tmp_path, change=tilted)
    volume = read_series(tmp_path)
    assert volume.warnings == (
        f"the gantry was tilted by {abs(degrees):.1f} degrees: corrected by shear",
    )
    side = 2 - axis
    places = volume.origin_mm[axis] + np.arange(volume.hu.shape[side]) * spacing
    start = (-10.0, -20.0)[axis]
    for index, hu in enumerate(volume.hu):
        first = start + drift * index
        columns = np.moveaxis(hu, side - 1, 0)
        for place, cells in zip(places, columns, strict=True):
            if first - 1e-6 <= place <= first + inside[-1] + 1e-6:
                assert np.abs(cells - 10 * place).max() < 0.1
            elif place < first - spacing or place > first + inside[-1] + spacing:
                assert (cells == -1024).all()


def test_single_slice_takes_its_thickness(tmp_path: Path) -> None:
    write_series(tmp_path, 1)
    volume = read_series(tmp_path, min_slices=1)
    assert volume.spacing_mm[0] == GAP
    assert volume.warnings == ("one slice only: its SliceThickness was taken as the slice spacing",)


def test_hash_is_of_the_files_in_slice_order(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    series = scan_series(tmp_path)
    assert series.series_hash == digest
    assert series.description == "8 slices of 8 x 6, 0.50 x 0.75 x 2.50 mm"
    assert read_series(tmp_path).series_hash == digest


def test_subfolders_and_names_without_suffix(tmp_path: Path) -> None:
    for index, path in enumerate(write_series(tmp_path / "R_001" / "2001" / "3")):
        path.rename(path.with_name(f"CT.1.2.{index}" if index % 2 else f"slice{index}"))
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    write_series(tmp_path)
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf" * 400)
    (tmp_path / "report.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / ".hidden").write_bytes(b"")
    for name, attributes in {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "Rows": 3},
        "page": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        "plan": {"Modality": "RTPLAN"},
    }.items():
        ds = data_set(0)
        every(**attributes)(ds, 0)
        save(ds, tmp_path / name)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == (
        "skipped 1 file of another modality, 1 localizer, 1 secondary capture, 3 non-DICOM files",
    )


def test_localizer_that_does_not_say_so_is_dropped(tmp_path: Path) -> None:
    write_series(tmp_path)
    ds = data_set(0)
    every(ImageOrientationPatient=[0, 1, 0, 0, 0, -1], Rows=3)(ds, 0)
    save(ds, tmp_path / "scout")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == ("dropped 1 slice of another orientation",)


@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_slice_given_twice_counts_once(same_bytes: bool, tmp_path: Path) -> None:
    write_series(tmp_path)
    ds = data_set(3)
    ds.SOPInstanceUID = ds.SOPInstanceUID if same_bytes else f"{SERIES}.99"
    save(ds, tmp_path / "copy")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == ("dropped 1 slice given twice",)


def test_links_are_not_followed_and_an_inode_counts_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    first = write_series(inside)[0]
    write_series(outside, change=every(SeriesInstanceUID="1.2.3"))
    (inside / "loop").symlink_to(inside)
    (inside / "other").symlink_to(outside)
    (inside / "slice").symlink_to(outside / "001.dcm")
    os.link(first, inside / "again.dcm")
    volume = read_series(inside)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == ("skipped 3 links (not followed)",)


def test_dicomdir_is_ignored(tmp_path: Path) -> None:
    write_series(tmp_path)
    ds = data_set(0)
    ds.DirectoryRecordSequence = Sequence([item(ReferencedFileID=["OTHER", "001"])])
    del ds.Modality
    save(ds, tmp_path / "DICOMDIR")
    assert read_series(tmp_path).warnings == ()


def test_a_data_set_without_the_dicm_mark_is_read(tmp_path: Path) -> None:
    for path in write_series(tmp_path, syntax=uids.ImplicitVRLittleEndian):
        data = path.read_bytes()
        start = data.index(b"\x08\x00\x08\x00")  # ImageType, the first element
        path.write_bytes(data[start:])
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_one_of_several_series_by_its_uid(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", 9, every(SeriesInstanceUID="1.2.3"))
    assert len(read_series(tmp_path, series_uid="1.2.3").hu) == 9
    assert len(read_series(tmp_path, series_uid=SERIES).hu) == 8


def test_a_file_that_changes_after_the_scan(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    series = scan_series(tmp_path)
    with paths[2].open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(
        SeriesError, match=r"file 6 of 8 \(006\.dcm\): the file changed while it was read"
    ):
        load_volume(series)
    paths[2].unlink()
    with pytest.raises(
        SeriesError, match=r"file 6 of 8 \(006\.dcm\): the file can't be opened any more"
    ):
        load_volume(series)


def test_missing_decoder_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path, change=compressed(b"\xff\xd8"))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MissingDependencyError, match="pip install imagecodecs"):
        read_series(tmp_path)


def test_import_is_light() -> None:
    code = "import sys, cdt_runtime.ct; print({'pydicom', 'imagecodecs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match=r"^nowhere: no such folder: give the folder that holds"):
        scan_series(tmp_path / "nowhere")


def test_no_header_text_leaves_the_reader(tmp_path: Path) -> None:
    write_series(tmp_path)
    series = scan_series(tmp_path)
    assert not re.search(
        re.escape(PATIENT), repr(series) + repr(series.frames) + repr(vars(series))
    )
