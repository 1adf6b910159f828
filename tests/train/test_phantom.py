"""Phantom data: real files, the same every time, whole or not there, and no free lunch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_train.data import phantom, read_hospital
from cdt_train.data.phantom import write_phantom
from cdt_train.data.phantom_tiles import CHANNELS, CLASSES, patient_stain, phantom_tile

SMALL = {"n_patients": 2, "n_ct": 1, "regions_per_class": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "hospital"
    write_phantom(path, seed=3, **SMALL)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_hospital_reader_reads_it(folder: Path) -> None:
    dataset = read_hospital(folder)
    assert dataset.classes == CLASSES
    assert dataset.grouped_by == "patient"
    assert dataset.warnings == ()
    assert sorted((t.patient, t.label) for t in dataset.tiles) == [
        (patient, label) for patient in ("Patient_001", "Patient_002") for label in CLASSES
    ]
    assert [s.path.relative_to(folder).as_posix() for s in dataset.ct] == [
        "ct_data/R_001/20000101/SERIES"
    ]


def test_a_tile_is_an_ome_tiff_with_named_channels(folder: Path) -> None:
    path = folder / "pathology_data" / "Patient_001" / "region_001" / "tile.ome.tif"
    for tile in (path, folder / "new_patient" / "tumor_stroma_1.tif"):
        with tifffile.TiffFile(tile) as file:
            assert file.is_ome
            assert file.series[0].axes == "CYX"
            image = file.asarray()
            text = file.ome_metadata or ""
        assert image.shape == (6, 256, 256)
        assert image.dtype == np.uint8
        assert all(f'Name="{name}"' in text for name in CHANNELS)
        assert 'PhysicalSizeX="0.5"' in text


def test_a_ct_is_a_series_of_a_chest_in_hounsfield_units(folder: Path) -> None:
    files = [pydicom.dcmread(f) for f in sorted((folder / "new_patient" / "ct").glob("*.dcm"))]
    first = files[0]
    assert len(files) == 24
    assert first.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert list(first.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert first.PatientName == "PHANTOM^NEW_PATIENT"
    heights = [float(f.ImagePositionPatient[2]) for f in files]
    assert np.allclose(np.diff(heights), -5.0)
    assert len({f.SOPInstanceUID for f in files}) == 24
    assert len({f.SeriesInstanceUID for f in files}) == 1
    hu = np.stack([f.pixel_array * f.RescaleSlope + f.RescaleIntercept for f in files])
    share = {
        "lung": ((hu > -950) & (hu < -750)).mean(),
        "fat": ((hu > -140) & (hu < -60)).mean(),
        "soft": ((hu > 0) & (hu < 100)).mean(),
        "bone": (hu > 250).mean(),
    }
    assert share["lung"] > 0.05, share
    assert share["fat"] > 0.02, share
    assert share["soft"] > 0.05, share
    assert 0.003 < share["bone"] < 0.1, share


def test_uids_differ_between_patients_and_seeds(folder: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "other", seed=4, n_patients=1, n_ct=1, regions_per_class=1)
    series = [
        pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID
        for root in (folder, tmp_path / "other")
        for path in sorted(root.rglob("1-001.dcm"))
    ]
    assert len(set(series)) == len(series) == 4


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "again", seed=3, **SMALL)
    assert contents(tmp_path / "again") == contents(folder)


def test_a_larger_set_begins_with_the_smaller_one(folder: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "one", seed=3, n_patients=1, n_ct=1, regions_per_class=1)
    large = contents(folder)
    for name, data in contents(tmp_path / "one").items():
        if name.endswith((".dcm", ".tif")):
            assert large[name] == data, name


def test_another_seed_gives_other_data(folder: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "other", seed=4, **SMALL)
    name = "new_patient/tumor_stroma_1.tif"
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_a_second_call_writes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_phantom(folder, seed=3, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phantom, "_write_ct", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data").mkdir()
    write_phantom(tmp_path / "data", **SMALL)
    assert json.loads((tmp_path / "data" / "PHANTOM.json").read_text())["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_appears_meanwhile_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "data"
    whole = phantom._write

    def beaten(partial: Path, made: phantom._Made) -> None:
        whole(partial, made)
        shutil.copytree(folder, target)

    monkeypatch.setattr(phantom, "_write", beaten)
    write_phantom(target, seed=3, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_it_never_overwrites(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds phantom data made with \{'seed': 3.*delete it"):
        write_phantom(folder, seed=5, **SMALL)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(DatasetError, match="exists and is no phantom data: choose a new folder"):
        write_phantom(tmp_path, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_impossible_parameters(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="n_ct = 0: phantom data need at least 1"):
        write_phantom(tmp_path / "data", n_ct=0)
    with pytest.raises(DatasetError, match="seed = -1: expected 0 or more"):
        write_phantom(tmp_path / "data", seed=-1)


def _draw(n_patients: int, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Tiles `(n, 6, 256, 256)` in pairs of the two classes, and their classes."""
    tiles, labels = [], []
    for patient in range(n_patients):
        stain = patient_stain(np.random.default_rng([patient]))
        for region in range(per_class):
            for label, name in enumerate(CLASSES):
                rng = np.random.default_rng([patient, region, label])
                tiles.append(phantom_tile(rng, name, stain))
                labels.append(label)
    return np.stack(tiles), np.array(labels)


def _accuracy(features: NDArray[np.float64], labels: NDArray[np.intp]) -> float:
    """Of nearest class means, fitted on the patients of the first half, tested on the others."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = len(labels) // 2
    means = np.stack([features[:half][labels[:half] == label].mean(0) for label in (0, 1)])
    distance = ((features[half:, None] - means) ** 2).sum(2)
    return float((distance.argmin(1) == labels[half:]).mean())


def test_arrangement_tells_the_classes_apart_and_colour_does_not() -> None:
    tiles, labels = _draw(n_patients=12, per_class=3)
    pixels = tiles.reshape(len(tiles), 6, -1).astype(float)
    percentiles = np.percentile(pixels, [5, 25, 50, 75, 95, 99], axis=2)
    colour = [pixels.mean(2), pixels.std(2), *percentiles]
    assert _accuracy(np.concatenate(colour, axis=1), labels) < 0.68
    # tumour in coarse blocks: one front leans to one side, nests are spread over the tile
    blocks = tiles[:, 1].reshape(len(tiles), 4, 64, 4, 64).mean((2, 4))
    blocks -= blocks.mean((1, 2), keepdims=True)
    place = np.linspace(-1, 1, 4)
    lean = np.hypot((blocks * place).mean((1, 2)), (blocks * place[:, None]).mean((1, 2)))
    arranged = np.stack([lean / blocks.std((1, 2))], axis=1)
    assert _accuracy(arranged, labels) > 0.75
