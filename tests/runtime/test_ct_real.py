"""Real CT files: the same HU as SimpleITK; a malformed file is an error of one line or sane HU."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from both_ways import read_series

from cdt_runtime.ct import Volume, scan_series
from cdt_runtime.errors import SeriesError

sitk = pytest.importorskip("SimpleITK")


def _reference(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """`(D, H, W)` HU and the origin by SimpleITK, one file at a time, turned to LPS.

    Slice by slice, for SimpleITK's own series reader averages unequal gaps.
    """
    slices = []
    for file in files:
        image = sitk.ReadImage(str(file))
        image = sitk.DICOMOrient(image, "LPS")
        hu = np.maximum(sitk.GetArrayFromImage(image).astype(np.float32), -1024)
        slices.append((image.TransformIndexToPhysicalPoint((0, 0, 0)), hu))
    slices.sort(key=lambda one: one[0][2])
    return np.concatenate([hu for _, hu in slices]), np.array(slices[0][0])


def _assert_same(volume: Volume, files: list[Path]) -> None:
    hu, origin = _reference(files)
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.origin_mm, origin, atol=1e-4)


def _alone(path: Path, folder: Path) -> Path:
    shutil.copy(path, folder / path.name)
    return folder


def test_chest_series_is_as_simpleitk_reads_it(chest_series: Path) -> None:
    volume = read_series(chest_series)
    assert volume.description == "64 slices of 512 x 512, 0.70 x 0.70 x 2.50 mm"
    assert volume.hu.dtype == np.float32
    assert volume.hu.min() == -1024
    assert volume.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125))
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    _assert_same(volume, sorted(chest_series.glob("*.dcm")))


def test_jpeg_2000_series_without_a_series_uid(real_data: Path) -> None:
    folder = real_data / "ct" / "totalseg" / "example_ct_dicom"
    volume = read_series(folder)
    assert volume.description == "20 slices of 512 x 512, 0.98 x 0.98 x 2.00 mm"
    _assert_same(volume, sorted(folder.iterdir()))


SINGLE = [
    "CT1_UNC.explicit_big_endian.dcm",
    "CT1_UNC.fragmented_bot_jpeg_ls.80.dcm",
    "CT1_UNC.implicit_little_endian.dcm",
    "pydicom/CT_small.dcm",
    "pydicom/J2K_pixelrep_mismatch.dcm",
    "pydicom/dicomdirtests/77654033/CT2/17106",
    "pydicom/dicomdirtests/98892001/CT5N/2062",
    "../dicom_malformed/bad_sequence.dcm",
]


@pytest.mark.parametrize("name", SINGLE)
def test_single_slice(name: str, real_data: Path, tmp_path: Path) -> None:
    path = real_data / "dicom_odd" / name
    volume = read_series(_alone(path, tmp_path), min_slices=1)
    _assert_same(volume, [path])
    assert "one slice only" in " ".join(volume.warnings)


def test_single_slice_stored_upside_down(real_data: Path, tmp_path: Path) -> None:
    """A JPEG 2000 slice that begins at the back; it has no SliceThickness, so it is given one."""
    path = real_data / "dicom_odd" / "pydicom" / "explicit_VR-UN.dcm"
    ds = pydicom.dcmread(path)
    ds.SliceThickness = 5
    ds.save_as(tmp_path / path.name)
    _assert_same(read_series(tmp_path, min_slices=1), [path])


def test_series_of_five_beside_its_localizers(real_data: Path) -> None:
    folder = real_data / "dicom_odd" / "pydicom" / "dicomdirtests" / "98892001"
    volume = read_series(folder, min_slices=5)
    _assert_same(volume, sorted((folder / "CT5N").iterdir()))
    assert volume.warnings == ("skipped 2 localizers",)


ENHANCED = ["explicit_little_endian", "fragmented_no_bot_jpeg_lossless.70"]
ENHANCED += ["not_fragmented_bot_jpeg_ls.80", "not_fragmented_bot_rle"]


@pytest.mark.parametrize("name", ENHANCED)
def test_enhanced_file(name: str, real_data: Path, tmp_path: Path) -> None:
    """The file is a perfusion map and refused as such; renamed a plain image, it must decode."""
    path = real_data / "dicom_odd" / f"CT0012.{name}.dcm"
    with pytest.raises(SeriesError, match="ImageType says PERFUSION, these values are not HU"):
        scan_series(_alone(path, tmp_path), min_slices=1)
    ds = pydicom.dcmread(path)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.save_as(tmp_path / path.name)
    volume = read_series(tmp_path, min_slices=1)
    _assert_same(volume, [path])


def test_a_tilted_series_is_straightened(tilted_series: Path) -> None:
    """Held against SimpleITK: the sheared grid's values, looked up where they lie in the room."""
    volume = read_series(tilted_series)
    assert "the gantry was tilted by 18.5 degrees: corrected by shear" in volume.warnings
    assert any(note.startswith("skipped ") for note in volume.warnings)
    headers = [
        (pydicom.dcmread(path, force=True), path)
        for path in tilted_series.rglob("*")
        if path.is_file()
    ]
    slices = [
        (ds, path)
        for ds, path in headers
        if ds.get("Modality") == "CT" and "AXIAL" in ds.get("ImageType", [])
    ]
    assert len(slices) == volume.hu.shape[0] == 24
    axes = np.array(volume.direction) * np.array(volume.spacing_mm)[:, None]
    rng = np.random.default_rng(0)
    gaps = []
    for _, path in slices:
        plane = sitk.ReadImage(str(path))
        hu = sitk.GetArrayFromImage(plane)[0].astype(float)
        for _ in range(40):
            row, column = rng.integers(1, np.array(hu.shape) - 1)
            place = plane.TransformIndexToPhysicalPoint((int(column), int(row), 0))
            z, y, x = np.linalg.solve(axes.T, np.array(place) - np.array(volume.origin_mm))
            assert abs(z - round(z)) < 0.05
            low = int(np.floor(y))
            part = y - low
            found = volume.hu[round(z), low : low + 2, round(x)] @ [1 - part, part]
            near = hu[row - 1 : row + 2, column]
            gaps.append(max(0, found - near.max(), near.min() - found))
    assert np.max(gaps) < 1  # within what the neighbours down the slice hold


def test_duplicates_and_gaps(real_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data / "dicom_odd" / "dicomnumpy_dupe_positions.zip") as archive:
        archive.extractall(tmp_path)
    with pytest.raises(SeriesError, match=r"slice spacing is 32\.5 mm, expected 0\.05 to 10 mm"):
        scan_series(tmp_path)
    # Two files hold the same pixels at the same place under two SOPInstanceUIDs: one remains.
    with pytest.raises(SeriesError, match="the series has 10 slices, expected at least 11"):
        scan_series(tmp_path, min_slices=11)


def test_other_planes(real_data: Path, tmp_path: Path) -> None:
    name = "covid19_ny_sbu_A046441_orientations.tar.xz"
    with tarfile.open(real_data / "dicom_odd" / name) as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(SeriesError, match=r"holds 6 CT series: .*choose one with --series UID"):
        scan_series(tmp_path)
    for plane in ("coronal", "sagittal"):
        for path in tmp_path.rglob(f"{plane}/*.dcm"):
            alone = tmp_path / path.stem
            alone.mkdir()
            with pytest.raises(SeriesError, match=f"the series is {plane}, 90 degrees off axial"):
                scan_series(_alone(path, alone), min_slices=1)
    for path in tmp_path.rglob("axial/*.dcm"):
        alone = tmp_path / path.stem
        alone.mkdir()
        _assert_same(read_series(_alone(path, alone), min_slices=1), [path])


def test_no_file_gets_past_as_a_traceback(real_data: Path, tmp_path: Path) -> None:
    """Each odd or malformed file alone: an error of one line, or finite HU."""
    files = [*(real_data / "dicom_malformed").iterdir(), *(real_data / "dicom_odd").rglob("*")]
    errors: list[str] = []
    volumes: list[Volume] = []
    for number, path in enumerate(sorted(p for p in files if p.is_file())):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            volumes.append(read_series(_alone(path, folder), min_slices=1))
        except SeriesError as error:
            errors.append(str(error))
    assert all("\n" not in error for error in errors)
    assert all(np.isfinite(volume.hu).all() and volume.hu.min() >= -1024 for volume in volumes)
    assert len(errors) > 40
    assert len(volumes) > 10
