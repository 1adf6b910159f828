"""Phantom data: real files, the same every time, whole or not there, and no free lunch."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_train.data import phantom, phantom_paired, read_hospital
from cdt_train.data.phantom import write_phantom
from cdt_train.data.phantom_findings import CT_TYPES
from cdt_train.data.phantom_paired import write_paired_phantom
from cdt_train.data.phantom_tiles import (
    CHANNELS,
    CLASSES,
    _other_share,
    patient_stain,
    phantom_tile,
)

SMALL = {"n_patients": 2, "n_ct": 1, "regions_per_class": 1}
PAIRED = {"n_patients": 12, "tiles_per_patient": 1}
MIXING = 0.35
TILE_PIN = [12.564, 12.110, 16.007, 13.558]
CT_PIN = [-764.752, -709.845, -716.637, -690.137]


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


def _draw(
    n_patients: int, per_class: int, mixing: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Tiles `(n, 6, 256, 256)` in pairs of the two classes, and their classes."""
    tiles, labels = [], []
    for patient in range(n_patients):
        stain = patient_stain(np.random.default_rng([patient]))
        for region in range(per_class):
            for label, name in enumerate(CLASSES):
                rng = np.random.default_rng([patient, region, label])
                tiles.append(phantom_tile(rng, name, stain, mixing))
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
    assert _accuracy(_lean(tiles), labels) > 0.75


def _lean(tiles: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Tumour in coarse blocks: one front leans to one side, nests are spread over the tile."""
    blocks = tiles[:, 1].reshape(len(tiles), 4, 64, 4, 64).mean((2, 4))
    blocks -= blocks.mean((1, 2), keepdims=True)
    place = np.linspace(-1, 1, 4)
    lean = np.hypot((blocks * place).mean((1, 2)), (blocks * place[:, None]).mean((1, 2)))
    return np.stack([lean / blocks.std((1, 2))], axis=1)


def _series(folder: Path) -> NDArray[np.float64]:
    """HU `(D, H, W)` of a folder with one series."""
    files = [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]
    return np.stack([f.pixel_array * f.RescaleSlope + f.RescaleIntercept for f in files])


def _quarters(image: NDArray[np.generic]) -> list[float]:
    """Mean of each quarter of the last two axes: pins pixels, whatever rounds a few by one."""
    half = image.shape[-1] // 2
    parts = np.split(image.astype(float), [half], axis=-2)
    return [float(q.mean()) for part in parts for q in np.split(part, [half], axis=-1)]


def test_the_unpaired_pixels_are_those_of_generator_3(folder: Path) -> None:
    assert phantom.GENERATOR == 3
    tile = tifffile.imread(
        folder / "pathology_data" / "Patient_001" / "region_001" / "tile.ome.tif"
    )
    hu = _series(folder / "ct_data" / "R_001")
    assert _quarters(tile) == pytest.approx(TILE_PIN, abs=0.01)
    assert _quarters(hu[12]) == pytest.approx(CT_PIN, abs=0.05)


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paired") / "hospital"
    write_paired_phantom(path, seed=3, agreement=0.8, **PAIRED)
    return path


def planted(folder: Path) -> dict[str, tuple[str, str]]:
    """Class and type of CT of each patient."""
    with (folder / "ct_types.csv").open(encoding="utf-8", newline="") as file:
        return {row["patient"]: (row["label"], row["ct_type"]) for row in csv.DictReader(file)}


def test_a_paired_patient_has_tiles_of_one_class_and_a_ct(tmp_path: Path) -> None:
    write_paired_phantom(tmp_path / "data", n_patients=5, tiles_per_patient=2)
    dataset = read_hospital(tmp_path / "data")
    assert dataset.grouped_by == "patient"
    assert dataset.warnings == ()
    tiles = Counter((tile.patient, tile.label) for tile in dataset.tiles)
    truth = planted(tmp_path / "data")
    assert tiles == {(patient, label): 2 for patient, (label, _) in truth.items()}
    assert [series.patient for series in dataset.ct] == sorted(truth)
    assert sorted(Counter(label for label, _ in truth.values()).values()) == [2, 3]
    assert json.loads((tmp_path / "data" / "PHANTOM.json").read_text()) == {
        "seed": 0,
        "n_patients": 5,
        "tiles_per_patient": 2,
        "agreement": 0.9,
        "mixing": MIXING,
        "generator": 3,
    }
    assert phantom.phantom_seed(tmp_path / "data") == 0


def _planned(seed: int, n_patients: int, agreement: float) -> dict[int, tuple[str, str]]:
    made = phantom_paired._Made(seed, n_patients, 1, agreement, 0.0)
    return {p.number: (p.label, p.ct_type) for p in phantom_paired._patients(made)}


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("n_patients", [20, 60])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
def test_the_agreement_is_exact_in_each_class(seed: int, n_patients: int, agreement: float) -> None:
    pairs = Counter(_planned(seed, n_patients, agreement).values())
    for label, own in zip(CLASSES, CT_TYPES, strict=True):
        of_class = n_patients // 2
        assert sum(n for (one, _), n in pairs.items() if one == label) == of_class
        assert pairs[label, own] == round(agreement * of_class)


def test_who_agrees_is_seeded_and_still_agrees_at_a_higher_agreement() -> None:
    own = dict(zip(CLASSES, CT_TYPES, strict=True))
    agreeing = {
        agreement: {
            n for n, (label, kind) in _planned(1, 40, agreement).items() if own[label] == kind
        }
        for agreement in (0.5, 0.75, 1.0)
    }
    assert agreeing[0.5] < agreeing[0.75] < agreeing[1.0]
    assert _planned(1, 40, 0.5) == _planned(1, 40, 0.5) != _planned(2, 40, 0.5)


def test_the_same_seed_gives_the_same_paired_bytes_and_agreement_leaves_tiles_alone(
    tmp_path: Path,
) -> None:
    few = {"n_patients": 2, "tiles_per_patient": 1}
    for name, agreement in (("one", 1.0), ("again", 1.0), ("none", 0.0)):
        write_paired_phantom(tmp_path / name, seed=2, agreement=agreement, **few)
    one, none = contents(tmp_path / "one"), contents(tmp_path / "none")
    assert contents(tmp_path / "again") == one
    changed = {name for name in one if one[name] != none[name]}
    assert not any(name.startswith("pathology_data") for name in changed)
    assert any(name.endswith(".dcm") for name in changed)


def _balance(hu: NDArray[np.float64]) -> float:
    """Air of the emptier half of the chest, as a share of the fuller half's."""
    solid = hu > -200
    inside = (
        np.maximum.accumulate(solid, 2) & np.maximum.accumulate(solid[:, :, ::-1], 2)[:, :, ::-1]
    )
    left, right = (half.sum() for half in np.split(inside & (hu < -500), 2, axis=2))
    return float(min(left, right) / max(left, right))


def test_the_types_of_ct_are_in_the_pixels(paired: Path) -> None:
    found: dict[str, list[float]] = {kind: [] for kind in CT_TYPES}
    sides = set()
    for patient, (_, kind) in planted(paired).items():
        hu = _series(paired / "ct_data" / patient)
        assert hu.shape == (24, 128, 128)
        found[kind].append(_balance(hu))
        left, right = np.split(hu, 2, axis=2)
        sides |= {bool(left.mean() > right.mean())} if kind == "effusion" else set()
    assert min(map(len, found.values())) > 3
    assert max(found["effusion"]) < 0.6 < min(found["emphysema"]), found
    assert np.std(found["effusion"]) > 0.1
    assert sides == {True, False}


def test_mixed_tiles_are_harder_but_not_hopeless() -> None:
    rng = np.random.default_rng(0)
    misleading = {
        mixing: np.mean([_other_share(rng, mixing) > 0.5 for _ in range(2000)])
        for mixing in (0.0, MIXING, 1.0)
    }
    assert misleading[0.0] < 0.05 < 0.08 < misleading[MIXING] < 0.25
    assert misleading[1.0] == pytest.approx(0.5, abs=0.05)
    tiles, labels = _draw(n_patients=24, per_class=2, mixing=1.0)
    assert _accuracy(_lean(tiles), labels) < 0.65


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"n_patients": 1},
            "n_patients = 1: paired phantom data need at least 2, one of each class",
        ),
        ({"tiles_per_patient": 0}, "tiles_per_patient = 0: phantom data need at least 1"),
        ({"agreement": 1.2}, "agreement = 1.2: expected 0 to 1"),
        ({"agreement": float("nan")}, "agreement = nan: expected 0 to 1"),
        ({"mixing": -0.5}, "mixing = -0.5: expected 0 to 1"),
        ({"seed": -1}, "seed = -1: expected 0 or more"),
    ],
)
def test_impossible_paired_parameters(
    wrong: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as caught:
        write_paired_phantom(tmp_path / "data", **wrong)  # type: ignore[arg-type]
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_paired_data_and_the_other_kind_do_not_pass_for_each_other(
    folder: Path, paired: Path
) -> None:
    with pytest.raises(DatasetError, match=r"holds phantom data made with .*'n_ct'.*delete it"):
        write_paired_phantom(folder, seed=3)
    with pytest.raises(DatasetError, match=r"holds phantom data made with .*'agreement': 0\.8"):
        write_phantom(paired, seed=3)
