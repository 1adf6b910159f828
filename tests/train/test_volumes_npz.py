"""Cubes of CT volumes, by an index or by the nodules that readers of LIDC-IDRI marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import volume, volumes_npz, write_csv, write_npz

from cdt_runtime.errors import DatasetError
from cdt_train.data import read_volumes_npz
from cdt_train.data.labelled import read_labelled

HEADER = "volume,z,y,x,label"
MARKS = "reader,nodule_id,z_vox2mm,y_vox2mm,x_vox2mm,inplane_extent_mm,malignancy_1to5"


def test_cubes_are_centred_on_their_places(tmp_path: Path) -> None:
    dataset = read_volumes_npz(volumes_npz(tmp_path))
    assert [tile.name for tile in dataset.tiles[:2]] == ["one.npz[16,16,17]", "one.npz[20,16,17]"]
    assert [tile.patient for tile in dataset.tiles] == ["one.npz"] * 2 + ["two.npz"] * 2
    assert dataset.grouped_by == "group"
    assert dataset.warnings == (
        f"{tmp_path}/index.csv names no patients: each volume is taken for a patient of its own, "
        "and results must not be called patient-level",
    )
    cube = dataset.tiles[0].pixels
    assert cube is not None
    assert np.array_equal(cube[..., 0], volume(3)[0:32, 0:32, 1:33])
    found = read_labelled("volumes_npz", tmp_path, image_size=None)
    assert found.images.dtype == np.int16
    assert found.images.shape == (4, 1, 32, 32, 32)
    assert np.array_equal(found.images[0, 0], cube[..., 0])


def test_a_cube_at_the_border_is_moved_inwards_and_that_is_said(tmp_path: Path) -> None:
    volumes_npz(tmp_path)
    path = write_csv(tmp_path / "mine.csv", HEADER, "one.npz,0,35,16,a", "two.npz,20,20,17,b")
    dataset = read_volumes_npz(path)
    cube = dataset.tiles[0].pixels
    assert cube is not None
    assert np.array_equal(cube[..., 0], volume(3)[0:32, 4:36, 0:32])
    assert "1 cube moved inwards from the border of the volume" in dataset.warnings


def test_folds_and_patients_of_the_index(tmp_path: Path) -> None:
    volumes_npz(tmp_path)
    path = write_csv(
        tmp_path / "mine.csv",
        f"{HEADER},split,patient_id",
        "one.npz,20,18,17,a,train,P1",
        "one.npz,21,18,17,b,train,P1",
        "two.npz,20,18,17,b,test,P2",
    )
    dataset = read_volumes_npz(path)
    assert [(tile.split, tile.patient) for tile in dataset.tiles] == [
        ("train", "P1"),
        ("train", "P1"),
        ("test", "P2"),
    ]
    assert dataset.grouped_by == "patient"
    assert dataset.warnings == ()


FAULTS = {
    "no volume": (["three.npz,16,16,16,a"], "line 2: DATA/three.npz is no npz file"),
    "escape": (["../one.npz,16,16,16,a"], "line 2: '../one.npz' leads out of DATA"),
    "outside": (["one.npz,40,16,16,a"], "line 2: z is 40, expected 0 to 39 in one.npz"),
    "negative": (["one.npz,16,-1,16,a"], "line 2: y is -1, expected 0 to 35 in one.npz"),
    "text": (["one.npz,16,16,left,a"], "line 2: x is 'left', expected a number"),
    "nan": (["one.npz,nan,16,16,a"], "line 2: z is 'nan', expected a number"),
    "no label": (["one.npz,16,16,16,"], "line 2: label is empty"),
    "twice": (
        ["one.npz,16,16,16,a", "one.npz,16,16,16,b"],
        "line 3: the place stands on line 2 to",
    ),
    "one class": (["one.npz,16,16,16,a"], "has one class only, 'a': at least 2 are needed"),
}


@pytest.mark.parametrize(("lines", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_of_the_index(tmp_path: Path, lines: list[str], message: str) -> None:
    volumes_npz(tmp_path)
    write_csv(tmp_path / "index.csv", HEADER, *lines)
    with pytest.raises(DatasetError) as caught:
        read_volumes_npz(tmp_path)
    assert message in str(caught.value).replace(str(tmp_path), "DATA")


def test_a_volume_too_small_for_a_cube(tmp_path: Path) -> None:
    volumes_npz(tmp_path)
    write_npz(tmp_path / "one.npz", hu=volume(0, (40, 31, 40)))
    with pytest.raises(
        DatasetError, match=r"has the shape \(40, 31, 40\), expected at least 32 vo"
    ):
        read_volumes_npz(tmp_path)


def test_which_csv(tmp_path: Path) -> None:
    folder = volumes_npz(tmp_path)
    write_csv(folder / "more.csv", HEADER, "one.npz,16,16,16,a")
    with pytest.raises(
        DatasetError, match=r"holds the indices index\.csv, more\.csv: give the path"
    ):
        read_volumes_npz(folder)
    for name in ("index.csv", "more.csv"):
        (folder / name).unlink()
    with pytest.raises(DatasetError, match="holds no CSV with the columns volume,z,y,x,label: lab"):
        read_volumes_npz(folder)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """One volume with a malignant and an unsure nodule, one with a benign one."""
    for name in ("p1_2mm", "p2_2mm"):
        write_npz(tmp_path / f"{name}.npz", hu=volume(len(name), (60, 60, 60)))
    write_csv(
        tmp_path / "p1_nodules.csv",
        MARKS,
        "0,a,20,20,20,9,5",
        "1,b,22,20,20,9,4",
        "0,c,40,40,40,6,3",
        "1,d,10,50,50,0,",
    )
    write_csv(tmp_path / "p2_nodules.csv", MARKS, "0,a,30,30,30,9,1", "2,z,30,31,30,9,3")
    return tmp_path


def test_the_marks_of_several_readers_are_one_nodule(marked: Path) -> None:
    dataset = read_volumes_npz(marked)
    assert [(tile.name, tile.label) for tile in dataset.tiles] == [
        ("p1_2mm.npz[21,20,20]", "malignant"),
        ("p2_2mm.npz[30,30.5,30]", "benign"),
    ]
    assert dataset.warnings[1] == (
        "1 mark without malignancy and 1 nodule of malignancy 3 left out"
    )


def test_an_index_goes_first_and_a_nodule_csv_can_be_chosen(marked: Path) -> None:
    write_csv(marked / "index.csv", HEADER, "p1_2mm.npz,30,30,30,x", "p2_2mm.npz,30,30,30,y")
    assert read_volumes_npz(marked).classes == ("x", "y")
    assert read_volumes_npz(marked / "p1_nodules.csv").classes == ("benign", "malignant")


def test_faults_of_the_marks(marked: Path) -> None:
    write_csv(marked / "p1_nodules.csv", MARKS, "0,a,20,20,20,9,7")
    with pytest.raises(DatasetError, match="line 2: malignancy_1to5 is 7, expected 1 to 5"):
        read_volumes_npz(marked)
    write_csv(marked / "p1_nodules.csv", MARKS, "0,a,20,20,20,9,5")
    write_npz(marked / "p1_2mm.npz", hu=volume(0, (60, 60, 60)), spacing_mm=np.array([1, 2, 2.0]))
    with pytest.raises(
        DatasetError, match=r"is in a grid of 2 mm, but p1_2mm\.npz has voxels of 1, "
    ):
        read_volumes_npz(marked)
    (marked / "p1_2mm.npz").unlink()
    with pytest.raises(DatasetError, match=r"expected one volume p1\*.npz beside it, found none"):
        read_volumes_npz(marked)


def test_no_nodule_that_says_anything(marked: Path) -> None:
    write_csv(marked / "p1_nodules.csv", MARKS, "0,a,20,20,20,9,3")
    (marked / "p2_nodules.csv").unlink()
    with pytest.raises(DatasetError, match="no nodule has a malignancy other than 3: nothing to"):
        read_volumes_npz(marked)


def test_the_real_files(real_data: Path) -> None:
    found = read_labelled("volumes_npz", real_data / "ct", image_size=None)
    assert found.images.shape == (840, 1, 32, 32, 32)
    assert np.bincount(found.targets).tolist() == [120] * 7
    assert np.bincount(found.groups).tolist() == [420, 420]
    assert "lung_parenchyma" in found.classes
    lung = found.images[found.targets == found.classes.index("lung_parenchyma")]
    spine = found.images[found.targets == found.classes.index("spine")]
    assert lung.mean() < -500 < spine.mean()
    with pytest.raises(DatasetError, match="has one class only, 'malignant'"):
        read_volumes_npz(real_data / "ct" / "lidc_idri_0001_nodules.csv")
