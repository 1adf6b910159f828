"""CT of any layout: DICOM series and npz volumes of one folder, as the model gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import csv_folds, volume, write_npz

from cdt_runtime.ct import Volume
from cdt_runtime.errors import DatasetError
from cdt_runtime.preprocess import Preprocess
from cdt_train.config import load_recipe
from cdt_train.data import CtSeries, TileDataset, read_csv
from cdt_train.data.arrays import CtArrays, fine_volume, load_ct
from cdt_train.data.ct_search import find_ct
from cdt_train.data.load import read_data
from cdt_train.data.npz_volume import AXES, read_npz_volume
from cdt_train.data.phantom_ct import SIZE
from cdt_train.data.phantom_dicom import write_series


@pytest.fixture
def ct_dir(tmp_path: Path) -> Path:
    """Two patients with DICOM, one of them with a volume too, and one with a volume alone."""
    folder = tmp_path / "ct"
    for patient in ("P1", "P2"):
        hu = np.random.default_rng(0).integers(-1000, 500, (9, SIZE, SIZE)).astype(np.int16)
        write_series(folder / patient / "2000" / "S", hu, 0.5, patient, 1)
    write_npz(folder / "P2" / "other.npz", hu=volume(1), spacing_mm=np.full(3, 2.0))
    write_npz(folder / "P3.npz", hu=volume(2), spacing_zyx=np.array([4, 2, 2], np.float32))
    for name in ("a.nii.gz", "list.csv", "scan.tar.xz", ".hidden.npz"):
        (folder / name).touch()
    return folder


def test_finds_series_and_volumes_and_says_what_it_does_not_read(ct_dir: Path) -> None:
    found, warnings = find_ct(ct_dir)
    assert [(one.patient, one.name) for one in found] == [
        ("P1", "P1/2000/S"),
        ("P2", "P2/2000/S"),
        ("P2", "P2/other.npz"),
        ("P3", "P3.npz"),
    ]
    assert warnings == [
        f"1 NIfTI file in {ct_dir} not read, first a.nii.gz: CT is read from DICOM and npz"
    ]


def test_a_folder_that_is_one_series(ct_dir: Path) -> None:
    found, _ = find_ct(ct_dir / "P1" / "2000" / "S")
    assert [(one.patient, one.name) for one in found] == [("S", "S")]


def test_a_folder_without_ct(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no CT: expected PATIENT/\.\.\./\*\.dcm, or \*\.n"):
        find_ct(tmp_path)
    with pytest.raises(DatasetError, match=r"none: no such folder: --ct-dir holds PATIENT/"):
        find_ct(tmp_path / "none")


def test_any_layout_takes_it(ct_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.layout=csv", "data.image_size=32"])
    data = read_data(recipe, csv_folds(tmp_path / "data"), ct_dir)
    assert data.ct.patients == ("P1", "P2", "P2", "P3")
    assert data.ct.volumes.shape == (4, 1, 16, 128, 128)
    assert [tuple(fine.shape) for fine in data.ct.fine] == [
        (22, 64, 64),
        (22, 64, 64),
        (40, 36, 34),
        (80, 36, 34),
    ]
    assert data.paired  # P1 has tiles too
    assert data.info["ct_dir"] == str(ct_dir)
    assert "4 CT series" in data.info["data"]
    kept = data.ct.without(["P2"])
    assert kept.patients == ("P1", "P3")
    assert [len(fine) for fine in kept.fine] == [22, 80]
    assert data.ct.take([3, 0]).sha256 == (data.ct.sha256[3], data.ct.sha256[0])


def load(*series: CtSeries) -> tuple[CtArrays, tuple[str, ...]]:
    dataset = TileDataset((), series, ("a", "b"), "tile")
    return load_ct(dataset, Preprocess(channels=("R",)), Path("/data"), lambda items, _: items)


def test_no_ct_at_all_is_no_error() -> None:
    ct, warnings = load()
    assert (len(ct), ct.fine, warnings) == (0, (), ())
    assert ct.volumes.shape == (0, 1, 16, 128, 128)
    assert len(ct.without(["P1"])) == 0


def test_a_volume_that_cannot_be_used_is_left_out_with_its_reason(tmp_path: Path) -> None:
    good = write_npz(tmp_path / "good.npz", hu=volume(1))
    bad = write_npz(tmp_path / "bad.npz", ct=volume(1))
    ct, warnings = load(CtSeries(good, "1", "good.npz"), CtSeries(bad, "2", "bad.npz"))
    assert ct.patients == ("1",)
    assert warnings == (
        "good.npz: no spacing_mm in the file: taken to be 2 mm on every axis",
        "bad.npz: left out: has no array 'hu', only ct: save it under that name",
    )
    with pytest.raises(
        DatasetError, match=r"no CT series can be used; bad\.npz: left out: has no a"
    ):
        load(CtSeries(bad, "2", "bad.npz"))


def test_an_npz_volume_is_the_runtimes_own(tmp_path: Path) -> None:
    hu = volume(5).astype(np.float32)
    hu[0, 0, 0] = -3024
    path = write_npz(tmp_path / "v.npz", hu=hu, spacing_mm=np.array([2.5, 1, 1]))
    found = read_npz_volume(path, 8)
    assert found.spacing_mm == (2.5, 1.0, 1.0)
    assert found.hu.dtype == np.float32
    assert found.hu[0, 0, 0] == -1024
    assert np.array_equal(found.hu[1:], hu[1:])
    assert found.warnings == ()
    assert len(found.series_hash) == 64


BAD_VOLUMES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"hu": np.zeros((4, 4), np.int16)}, "array 'hu' has the shape (4, 4), expected (D, "),
    "empty": ({"hu": np.zeros((0, 4, 4), np.int16)}, "array 'hu' has the shape (0, 4, 4), expect"),
    "dtype": ({"hu": np.zeros((9, 4, 4), np.uint8)}, "array 'hu' is uint8, expected int16 or fl"),
    "nan": (
        {"hu": np.full((9, 4, 4), np.nan, np.float32)},
        "array 'hu' has NaN or infinity at index 0: leave it out, or fill it",
    ),
    "few slices": ({"hu": np.zeros((3, 4, 4), np.int16)}, "array 'hu' has 3 slices, expected at l"),
    "spacing": (
        {"hu": np.zeros((9, 4, 4), np.int16), "spacing_mm": np.array([2, np.nan, 2])},
        "spacing is [2.0, nan, 2.0] mm (z, y, x), expected 0.05 to 10: correct it",
    ),
    "two spacings": (
        {"hu": np.zeros((9, 4, 4), np.int16), "spacing_mm": np.array([2, 2])},
        "array 'spacing_mm' is int64 of shape (2,), expected 3 numbers: z, y and x in mm",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_VOLUMES.values(), ids=BAD_VOLUMES)
def test_a_bad_volume_is_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_npz_volume(write_npz(tmp_path / "v.npz", **arrays), 8)
    assert str(caught.value).startswith(f"{tmp_path / 'v.npz'}: {message}")


def as_volume(hu: np.ndarray, *spacing: float) -> Volume:
    z, y, x = spacing
    return Volume(hu.astype(np.float32), (z, y, x), (0.0, 0.0, 0.0), AXES, "0")


class TestFineVolume:
    def test_at_two_millimetres_it_is_the_volume_itself(self) -> None:
        hu = volume(0)
        assert np.array_equal(fine_volume(as_volume(hu, 2, 2, 2)).numpy(), hu)

    def test_finer_voxels_become_their_means_and_coarser_ones_are_interpolated(self) -> None:
        hu = np.zeros((4, 8, 8))
        hu[:, :, 1::2] = 100
        fine = fine_volume(as_volume(hu, 5, 1, 1))
        assert fine.dtype == torch.int16
        assert fine.shape == (10, 4, 4)
        assert (fine == 50).all()

    def test_the_middle_of_a_long_volume_is_kept_and_hu_are_clipped(self) -> None:
        hu = np.zeros((500, 4, 4))
        hu[250] = 9999
        fine = fine_volume(as_volume(hu, 2, 0.5, 0.5))
        assert fine.shape == (200, 1, 1)
        assert fine.max() == 3071
        assert int(fine.argmax()) == 100


def test_the_real_folder(real_data: Path, tmp_path: Path) -> None:
    dataset = read_csv(csv_folds(tmp_path), real_data / "ct")
    assert [series.name for series in dataset.ct] == [
        "lidc_idri_0001_2mm.npz",
        "lidc_idri_0002_2mm.npz",
        "totalseg/example_ct_dicom",
    ]
    ct, warnings = load(*dataset.ct)
    assert warnings == ()
    assert [tuple(fine.shape) for fine in ct.fine] == [
        (166, 180, 180),
        (163, 175, 175),
        (20, 200, 200),
    ]
    assert all(fine.min() == -1024 for fine in ct.fine)
