"""Folds: those of the data set where it has some, else by group."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cdt_runtime.errors import DatasetError
from cdt_runtime.preprocess import Preprocess
from cdt_train.config import load_recipe
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.data.labelled import read_labelled
from cdt_train.data.load import LoadedData
from cdt_train.episodes import group_folds, hold_out_groups
from cdt_train.split import make_folds, part_indices

LABELS = np.tile([0, 1], 24)
GROUPS = np.repeat(np.arange(12), 4)


def parts(split: list[str] | None) -> list[list[list[int]]]:
    found = part_indices(LABELS, GROUPS, split, num_folds=3, val_share=0.25, seed=0)
    for part in found:
        sides = [set(GROUPS[side].tolist()) for side in (part.train, part.val, part.test)]
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
        everything = np.sort(np.concatenate([part.train, part.val, part.test]))
        assert np.array_equal(everything, np.arange(len(LABELS)))
    return [[np.unique(GROUPS[s]).tolist() for s in (p.train, p.val, p.test)] for p in found]


def by_group(*names: str) -> list[str]:
    return [names[group] for group in GROUPS]


def test_without_a_split_each_group_is_tested_once() -> None:
    tests = [test for _, _, test in parts(None)]
    assert sorted(group for test in tests for group in test) == list(range(12))


def test_numbered_folds_are_each_the_test_side_once_in_order_of_number() -> None:
    found = parts(by_group("0", "2", *["10"] * 4, *["2"] * 6))
    assert [test for _, _, test in found] == [[0], [1, 6, 7, 8, 9, 10, 11], [2, 3, 4, 5]]


def test_a_whole_split_is_taken_as_it_is() -> None:
    assert parts(by_group(*["train"] * 6, *["val"] * 3, *["test"] * 3)) == [
        [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]
    ]


@pytest.mark.parametrize("other", ["val", "test"])
def test_a_split_that_lacks_a_side_draws_val_from_train(other: str) -> None:
    ((train, val, test),) = parts(by_group(*["train"] * 9, *[other] * 3))
    assert test == [9, 10, 11]
    assert len(val) == 2
    assert sorted(train + val) == list(range(9))


def loaded(
    split: list[str] | None, ct: tuple[str, ...] = (), labels: np.ndarray = LABELS
) -> LoadedData:
    names = tuple(map(str, range(48)))
    tiles = TileArrays(
        torch.zeros((48, 1, 4, 4), dtype=torch.uint8),
        labels,
        GROUPS,
        ("a", "b"),
        names,
        names,
        None if split is None else tuple(split),
    )
    fine = tuple(torch.zeros((4, 4, 4), dtype=torch.int16) for _ in ct)
    volumes = CtArrays(torch.zeros((len(ct), 1, 8, 64, 64)), ct, ct, fine)
    patients = tuple(f"P{group:02d}" for group in range(12))
    return LoadedData(tiles, volumes, Preprocess(channels=("gray",)), patients, {})


RECIPE = load_recipe(
    None, ["training.k_shot=2", "training.val_episodes=3", "training.test_episodes=3"]
)


def test_the_folds_of_the_data_set_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folds = make_folds(RECIPE, loaded(by_group(*["0"] * 4, *["1"] * 4, *["2"] * 4)), tmp_path)
    assert [fold.split["test"][0] for fold in folds] == ["0", "16", "32"]
    assert capsys.readouterr().err.splitlines() == [
        "folds are those of the data set (0, 1, 2): training.num_folds is not used",
        "K = 3 is left out of the tables: some split has too few tiles of a class for it",
        "K = 5 is left out of the tables: some split has too few tiles of a class for it",
    ]
    assert all(set(fold.test_episodes) == {1, 2} for fold in folds)


def test_no_ct_at_all_is_no_error_and_only_held_out_ct_is(tmp_path: Path) -> None:
    assert [len(fold.ct) for fold in make_folds(RECIPE, loaded(None), tmp_path)] == [0, 0, 0]
    split = by_group(*["train"] * 8, *["val"] * 2, *["test"] * 2)
    (fold,) = make_folds(RECIPE, loaded(split, ("P00", "P11")), tmp_path)
    assert fold.ct.patients == ("P00",)
    with pytest.raises(DatasetError, match="fold 1: every CT series is of a validation or test pa"):
        make_folds(RECIPE, loaded(split, ("P11",)), tmp_path)


def test_a_side_without_a_class_is_named(tmp_path: Path) -> None:
    labels = np.where(GROUPS >= 10, 1, LABELS)
    data = loaded(by_group(*["train"] * 8, *["val"] * 2, *["test"] * 2), labels=labels)
    with pytest.raises(
        DatasetError,
        match="fold 1: class 'a' has no test tile in the data set's own split: add some, or",
    ):
        make_folds(RECIPE, data, tmp_path)


def test_tiles_without_groups_are_parted_class_by_class() -> None:
    labels = np.repeat([0, 1, 2], [30, 60, 90])
    tests = group_folds(labels, np.arange(180), 3, seed=1)
    assert sorted(np.concatenate(tests)) == list(range(180))
    assert [np.bincount(labels[test]).tolist() for test in tests] == [[10, 20, 30]] * 3


def test_a_hundred_thousand_groups_are_held_out_at_once() -> None:
    labels = np.arange(100_000) % 9
    rest, held = hold_out_groups(labels, np.arange(100_000), 0.25, np.random.default_rng(0))
    assert len(held) == 25_000
    assert len(np.intersect1d(rest, held)) == 0


def test_the_real_tiles(real_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data / "pathology" / "lc25000_lung_dev.zip") as archive:
        archive.extractall(tmp_path)
    found = read_labelled("csv", tmp_path, image_size=32)
    assert found.images.shape == (1350, 3, 32, 32)
    assert np.bincount(found.targets).tolist() == [450, 450, 450]
    assert len(set(found.groups)) == 450
    folds = found.with_group_folds(3, seed=0)
    assert folds.folds == ("0", "1", "2")
    first = folds.with_test_fold("0")
    test = first.split == "test"
    assert np.bincount(found.targets[test]).tolist() == [150, 150, 150]
    assert not set(found.groups[test]) & set(found.groups[~test])
    with pytest.raises(DatasetError, match=r"fold '7': the data set has the folds 0, 1, 2"):
        folds.with_test_fold("7")
