"""Every layout: what it lists, what it reads, and what all of them refuse alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import MAKERS, hospital, image, image_folders, write_csv

from cdt_runtime.errors import DatasetError, RecipeError
from cdt_train.config import load_recipe
from cdt_train.data import DATASETS, HOLDS, read_csv, read_dataset, read_image_folders
from cdt_train.data.labelled import read_labelled
from cdt_train.data.load import read_data
from cdt_train.episodes import EpisodeSampler

IS_3D = {"volumes_npz"}


def test_every_layout_is_tested_and_told() -> None:
    assert set(MAKERS) == set(DATASETS) == set(HOLDS)


@pytest.mark.parametrize("layout", DATASETS)
class TestEveryLayout:
    def test_lists_named_labelled_tiles(self, layout: str, tmp_path: Path) -> None:
        dataset = DATASETS[layout](MAKERS[layout](tmp_path / "data"))
        assert {tile.label for tile in dataset.tiles} == set(dataset.classes)
        assert len(dataset.classes) == 2
        places = {(tile.path, tile.name) for tile in dataset.tiles}
        assert len(places) == len(dataset.tiles)
        assert dataset.grouped_by == "patient" or dataset.warnings

    def test_reads_into_arrays(self, layout: str, tmp_path: Path) -> None:
        folder = MAKERS[layout](tmp_path / "data")
        found = read_labelled(layout, folder, image_size=16)
        sides = 3 if layout in IS_3D else 2
        assert found.images.shape[2:] == (16,) * sides
        assert len(found) == len(found.targets) == len(found.groups) == len(set(found.names))
        assert found.task == "binary"
        assert found.fingerprint == read_labelled(layout, folder, image_size=16).fingerprint
        assert found.fingerprint != read_labelled(layout, folder, image_size=8).fingerprint

    def test_a_missing_folder_is_one_line(self, layout: str, tmp_path: Path) -> None:
        with pytest.raises(DatasetError) as caught:
            read_dataset(layout, tmp_path / "none")
        assert str(caught.value).endswith(f"no such folder: --data-dir holds {HOLDS[layout]}")

    def test_an_empty_folder_is_one_line(self, layout: str, tmp_path: Path) -> None:
        with pytest.raises(DatasetError) as caught:
            read_dataset(layout, tmp_path)
        assert str(caught.value).startswith(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", sorted(set(DATASETS) - IS_3D))
def test_loads_for_episodes_without_any_ct(layout: str, tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"data.layout={layout}", "data.image_size=32"])
    data = read_data(recipe, MAKERS[layout](tmp_path / "data"))
    assert len(data.tiles) == len(data.tiles.names)
    assert len(data.ct) == (1 if layout == "hospital" else 0)
    assert data.ct.volumes.shape[1:] == (1, 16, 128, 128)
    assert not data.paired
    labels, groups = data.tiles.labels, data.tiles.groups
    sampler = EpisodeSampler(labels, groups, data.tiles.classes, n_way=2, k_shot=1, n_query=1)
    assert len(sampler.sample(np.random.default_rng(0)).query) == 2


def test_an_unknown_layout() -> None:
    known = "hospital, image_folders, csv, medmnist, volumes_npz"
    with pytest.raises(RecipeError, match=f"data.layout: 'folders': expected one of {known}"):
        read_dataset("folders", Path("."))


def test_a_volume_is_no_tile(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.layout=volumes_npz"])
    with pytest.raises(
        DatasetError,
        match=r"one.npz\[16,16,17\]: is a volume of 32 x 32 x 32 voxels, and the few-shot "
        "classifier takes 2D tiles: train a supervised 3D model on it",
    ):
        read_data(recipe, MAKERS["volumes_npz"](tmp_path))


def fails(folder: Path, message: str, layout: str = "image_folders") -> None:
    with pytest.raises(DatasetError) as caught:
        read_dataset(layout, folder)
    text = str(caught.value).replace(str(folder), "DATA")
    assert message in text
    assert "\n" not in text


FOLDER_FAULTS = {
    "an empty class": (
        ["a/1.png", "b/notes.txt"],
        "DATA/b: the class has no image (expected .jpeg, .jpg, .png, .tif, .tiff): add images",
    ),
    "one class": (["train/a/1.png"], "DATA has one class only, 'a': at least 2 are needed"),
    "no train": (["val/a/1.png", "test/a/1.png"], "DATA has test/ but no train/: add it"),
    "twice": (
        ["train/a/1.png", "val/a/1.png", "valid/a/1.png"],
        "DATA has both val/ and valid/: keep one val split",
    ),
    "untrained": (
        ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
        "DATA: class 'c' is in test and not in train: add it there",
    ),
    "parted patient": (
        ["train/a/P1/1.png", "train/b/P2/1.png", "test/a/P1/2.png"],
        "DATA: patient 'P1' has tiles in the folds 'train' (1.png) and 'test' (2.png): a "
        "patient must not be parted: correct the folds, or leave them out and they are made",
    ),
    "patients": (
        ["8863/0/1.png", "8864/1/1.png"],
        "DATA has folders such as '8863', which look like patients, not classes: sort the "
        "tiles into CLASS/PATIENT/, or write a CSV and use data.layout=csv",
    ),
    "nothing in train": (["train/1.png"], "DATA/train has no class folders: expected train/CL"),
    "mixed": (
        ["a/1.png", "b/P1/1.png"],
        "DATA/a/1.png belongs to no patient and DATA/b/P1/1.png to 'P1'",
    ),
}


class TestImageFolders:
    def test_splits_by_any_of_their_names(self, tmp_path: Path) -> None:
        dataset = read_image_folders(image_folders(tmp_path))
        assert [tile.split for tile in dataset.tiles] == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
        assert len({tile.patient for tile in dataset.tiles}) == 18
        assert dataset.warnings == (
            f"{tmp_path} names no patients: the same patient may stand on both sides of a fold, "
            "and results must not be called patient-level",
        )

    @pytest.mark.parametrize("top", ["", "train/"])
    def test_without_splits_folds_are_to_be_made(self, tmp_path: Path, top: str) -> None:
        for name in ("a/1.jpeg", "a/2.jpg", "b/1.png"):
            image(tmp_path / f"{top}{name}", len(name))
        dataset = read_image_folders(tmp_path)
        assert {tile.split for tile in dataset.tiles} == {None}
        assert "folds are made by tile" in dataset.warnings[0]

    def test_patients_below_the_class(self, tmp_path: Path) -> None:
        for name in ("train/a/P1/1.png", "train/b/P1/2.png", "test/a/P2/1.png", "test/b/P3/1.png"):
            image(tmp_path / name, 0)
        dataset = read_image_folders(tmp_path)
        assert [tile.patient for tile in dataset.tiles] == ["P1", "P1", "P2", "P3"]
        assert dataset.grouped_by == "patient"
        assert dataset.warnings == ()

    def test_classes_may_be_numbers(self, tmp_path: Path) -> None:
        for name in ("0/x.png", "1/x.png"):
            image(tmp_path / name, 0)
        assert read_image_folders(tmp_path).classes == ("0", "1")

    @pytest.mark.parametrize(("names", "message"), FOLDER_FAULTS.values(), ids=FOLDER_FAULTS)
    def test_faults(self, tmp_path: Path, names: list[str], message: str) -> None:
        for name in names:
            path = image(tmp_path / f"{name}.png", 0)
            path.rename(tmp_path / name)
        fails(tmp_path, message)

    def test_other_folders_beside_the_splits_are_said(self, tmp_path: Path) -> None:
        image(image_folders(tmp_path) / "extra" / "1.png", 0)
        assert f"{tmp_path}/extra is no split and is left out" in (
            read_image_folders(tmp_path).warnings
        )


CSV_FAULTS = {
    "no column": (["path,class", "0.png,a"], "line 1: column 'label' is missing from 'path,cl"),
    "two names": (
        ["path,image_path,label", "0.png,0.png,a"],
        "line 1: columns 'path' and 'image_path' mean the same: keep one",
    ),
    "odd fold": (
        ["path,label,fold", "0.png,a,first"],
        "line 2: fold is 'first', expected a whole number, or train, val or test",
    ),
    "negative fold": (["path,label,fold", "0.png,a,-1"], "line 2: fold is '-1', expected"),
    "empty fold": (["path,label,fold", "0.png,a,"], "line 2: fold is empty"),
    "mixed folds": (
        ["path,label,fold", "0.png,a,train", "1.png,b,1"],
        "folds are both 'train' and '1': use numbers, or train, val and test",
    ),
    "one fold": (
        ["path,label,fold", "0.png,a,1", "1.png,b,01"],
        "every tile is in the fold '1': at least 2 folds are needed",
    ),
    "no train": (
        ["path,label,fold", "0.png,a,val", "1.png,b,test"],
        "no tile is in train, only in val and test: add it",
    ),
    "parted group": (
        ["path,label,fold,group", "0.png,a,0,G", "1.png,b,1,G"],
        "group 'G' has tiles in the folds '0' (0.png) and '1' (1.png): a group must not be pa",
    ),
    "one class": (["path,label", "0.png,a", "1.png,a"], "one class only, 'a': at least 2"),
    "escape": (["path,label", "../x.png,a"], "line 2: '../x.png' leads out of DATA"),
    "nothing there": (["path,label", "9.png,a"], "line 2: DATA/9.png does not exist"),
    "absolute": (["path,label", "/nowhere/9.png,a"], "line 2: /nowhere/9.png does not exist"),
    "twice": (["path,label", "0.png,a", "./0.png,a"], "line 3: the tile stands on line 2 alr"),
    "other label": (["path,label", "0.png,a", "0.png,b"], "line 3: label 'b', but line 2 gave"),
}


class TestCsv:
    @pytest.fixture
    def tiles(self, tmp_path: Path) -> Path:
        for number in range(4):
            image(tmp_path / f"{number}.png", number)
        return tmp_path

    def test_folds_patients_and_other_columns(self, tmp_path: Path) -> None:
        dataset = read_csv(MAKERS["csv"](tmp_path))
        assert [tile.split for tile in dataset.tiles[:4]] == ["0", "0", "1", "1"]
        assert dataset.tiles[0].patient == "P0"
        assert dataset.grouped_by == "patient"
        assert dataset.warnings == ()

    def test_the_file_itself_and_paths_from_anywhere(self, tiles: Path, tmp_path: Path) -> None:
        path = write_csv(
            tmp_path / "lists" / "mine.csv",
            "path,label,group",
            *(f"{tiles / f'{n}.png'},{'ab'[n % 2]},G{n}" for n in range(4)),
        )
        dataset = read_csv(path)
        assert [tile.path.name for tile in dataset.tiles] == [f"{n}.png" for n in range(4)]
        assert dataset.grouped_by == "group"

    def test_a_split_may_have_names(self, tiles: Path) -> None:
        sides = ("Train", "training", "VALID", "test")
        labels = ("a", "b", "a", "b")
        write_csv(
            tiles / "labels.csv",
            "path,label,split",
            *(
                f"{n}.png,{label},{side}"
                for n, (label, side) in enumerate(zip(labels, sides, strict=True))
            ),
        )
        dataset = read_csv(tiles)
        assert [tile.split for tile in dataset.tiles] == ["train", "train", "val", "test"]
        assert dataset.warnings == (
            f"{tiles}/labels.csv names no patients: the same patient may stand on both sides of a "
            "fold, and results must not be called patient-level",
        )

    def test_without_folds_it_warns_of_tiles(self, tiles: Path) -> None:
        write_csv(tiles / "manifest.csv", "path,label", "0.png,a", "1.png,b")
        assert "folds are made by tile" in read_csv(tiles).warnings[0]

    @pytest.mark.parametrize(("lines", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS)
    def test_faults(self, tiles: Path, lines: list[str], message: str) -> None:
        write_csv(tiles / "labels.csv", *lines)
        fails(tiles, message, "csv")

    def test_which_csv(self, tiles: Path) -> None:
        write_csv(tiles / "mine.csv", "path,label")
        fails(
            tiles,
            "DATA holds none of labels.csv, manifest.csv, folds.csv; give the path of one of mine",
            "csv",
        )
        for name in ("labels.csv", "folds.csv"):
            shutil.copy(tiles / "mine.csv", tiles / name)
        fails(tiles, "DATA holds labels.csv and folds.csv: give the path of the one that", "csv")

    def test_the_same_image_in_two_folds(self, tiles: Path) -> None:
        shutil.copy(tiles / "0.png", tiles / "2.png")
        write_csv(
            tiles / "labels.csv",
            "path,label,fold,group",
            *(f"{n}.png,{'ab'[n % 2]},{n // 2},G{n}" for n in range(4)),
        )
        with pytest.raises(
            DatasetError,
            match=r"2.png and 0.png are the same image under two patients \(or groups\), labels or "
            "folds: keep one",
        ):
            read_labelled("csv", tiles, image_size=None)

    def test_a_damaged_image_is_named(self, tiles: Path) -> None:
        write_csv(tiles / "labels.csv", "path,label,group", "0.png,a,1", "1.png,b,2")
        (tiles / "1.png").write_bytes((tiles / "1.png").read_bytes()[:100])
        with pytest.raises(DatasetError, match=r"^1\.png: 1\.png: "):
            read_labelled("csv", tiles, image_size=None)


def test_the_hospital_takes_ct_from_elsewhere(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "data")
    (folder / "ct_data").rename(tmp_path / "archive")
    with pytest.raises(DatasetError, match="ct_data is not a folder"):
        read_dataset("hospital", folder)
    dataset = read_dataset("hospital", folder, tmp_path / "archive")
    assert [series.patient for series in dataset.ct] == ["R_001"]
