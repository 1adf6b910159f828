"""Folds: which tiles and volumes train, choose and test; every episode drawn before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cdt_runtime.errors import DatasetError
from cdt_train.config import Recipe, TrainingRecipe
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.data.load import LoadedData
from cdt_train.episodes import Episode, EpisodeSampler, Ints, group_folds, hold_out_groups
from cdt_train.progress import say
from cdt_train.scores import draw_episodes

HOLD_OUT, VAL_EPISODES, TEST_EPISODES, TEST_CT, SUPPORT, TRIAL = range(6)
"""Purposes of random numbers: each has a stream of its own, `[seed, fold, purpose]`."""


@dataclass(frozen=True, eq=False)
class Fold:
    """The data of one fold.

    Attributes:
        number: from 1.
        folder: where the fold is written.
        train: tiles that weights are fitted to.
        val: tiles of other patients, for the choice of the epoch and for calibration.
        test: tiles of yet other patients, for evaluation alone.
        ct: volumes that training may see: none of a patient in `val` or `test`.
        sampler: draws training episodes from `train`.
        val_episodes: for each K fixed episodes over `val`, of all classes.
        test_episodes: for each K fixed episodes over `test`, of all classes.
    """

    number: int
    folder: Path
    train: TileArrays
    val: TileArrays
    test: TileArrays
    ct: CtArrays
    sampler: EpisodeSampler
    val_episodes: dict[int, list[Episode]]
    test_episodes: dict[int, list[Episode]]

    @property
    def split(self) -> dict[str, list[str]]:
        """Names of the tiles on each side."""
        return {side: list(getattr(self, side).names) for side in ("train", "val", "test")}


@dataclass(frozen=True, eq=False)
class Parts:
    """Indices of one fold: no group is in two of them.

    Attributes:
        train: what weights are fitted to.
        val: what the epoch is chosen by.
        test: what is evaluated.
    """

    train: Ints
    val: Ints
    test: Ints


def make_folds(recipe: Recipe, data: LoadedData, output_dir: Path) -> list[Fold]:
    """Part the data into folds by patient (or group) and draw every evaluation episode.

    Raises:
        DatasetError: the patients, tiles or volumes do not suffice; nothing was trained yet.
    """
    training, tiles = recipe.training, data.tiles
    if tiles.split is not None:
        listed = ", ".join(sorted(set(tiles.split), key=_in_order))
        say(f"folds are those of the data set ({listed}): training.num_folds is not used")
    parts = part_indices(
        tiles.labels,
        tiles.groups,
        tiles.split,
        num_folds=training.num_folds,
        val_share=training.val_share,
        seed=training.seed,
    )
    wanted = _wanted(training.folds, len(parts))
    folds = [
        _make_fold(number, output_dir / f"fold_{number}", recipe, data, parts[number - 1])
        for number in wanted
    ]
    shots = set.intersection(*({*fold.val_episodes} & {*fold.test_episodes} for fold in folds))
    for k in sorted(set(training.shots) - shots):
        say(f"K = {k} is left out of the tables: some split has too few tiles of a class for it")
    return [_with_shots(fold, sorted(shots)) for fold in folds]


def _wanted(folds: Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers of the folds to train.

    Raises:
        DatasetError: one of them does not exist.
    """
    if folds is None:
        return list(range(1, count + 1))
    if max(folds) > count:
        raise DatasetError(
            f"training.folds: {max(folds)} was asked for and there are {count} folds: give numbers "
            f"from 1 to {count}"
        )
    return sorted(set(folds))


def _with_shots(fold: Fold, shots: Sequence[int]) -> Fold:
    return replace(
        fold,
        val_episodes={k: fold.val_episodes[k] for k in shots},
        test_episodes={k: fold.test_episodes[k] for k in shots},
    )


def part_indices(
    labels: Ints,
    groups: Ints,
    split: Sequence[str] | None,
    *,
    num_folds: int,
    val_share: float,
    seed: int,
) -> list[Parts]:
    """Part samples into folds: by the data set's own split where it has one, else by group.

    Numbered folds are each the test side once. Of a split into train, val and test there is one
    fold; where it lacks test, val takes its place. Validation samples that no split names are drawn
    from the training side by group.

    Args:
        labels: `(n,)` class of each.
        groups: `(n,)` patient (or group) of each.
        split: of each, as `TileArrays.split`; None where the data set does not say.
        num_folds: where it does not.
        val_share: of the training groups.
        seed: of every draw.

    Raises:
        DatasetError: there are too few groups or samples.
    """
    named = np.array(split) if split is not None else None
    if named is None:
        tests = group_folds(labels, groups, num_folds, seed)
    elif "train" not in named:
        tests = [np.flatnonzero(named == fold) for fold in sorted(set(split or ()), key=_in_order)]
    else:
        train, val, test = (np.flatnonzero(named == side) for side in ("train", "val", "test"))
        if len(val) and len(test):
            return [Parts(train, val, test)]
        tests = [test if len(test) else val]
    return [
        _hold_out(number, labels, groups, test, val_share, seed)
        for number, test in enumerate(tests, start=1)
    ]


def _hold_out(
    number: int, labels: Ints, groups: Ints, test: Ints, val_share: float, seed: int
) -> Parts:
    rest = np.setdiff1d(np.arange(len(labels)), test)
    rng = np.random.default_rng([seed, number, HOLD_OUT])
    train, val = hold_out_groups(labels[rest], groups[rest], val_share, rng)
    return Parts(rest[train], rest[val], test)


def _in_order(split: str) -> tuple[int, str]:
    """Numbers by value; then train, val and test."""
    if split.isdigit():
        return int(split), ""
    return ("train", "val", "test").index(split), split


def _make_fold(number: int, folder: Path, recipe: Recipe, data: LoadedData, indices: Parts) -> Fold:
    training, tiles = recipe.training, data.tiles
    rng = np.random.default_rng([training.seed, number, TRIAL])
    held = np.unique(tiles.groups[np.concatenate([indices.val, indices.test])])
    ct = data.ct.without(data.patients[g] for g in held)
    if len(data.ct) and not len(ct):
        raise DatasetError(
            f"fold {number}: every CT series is of a validation or test patient, so training "
            f"would have none: add CT series of other patients, or lower --num-folds"
        )
    parts = (tiles.take(indices.train), tiles.take(indices.val), tiles.take(indices.test))
    for side, part in zip(("train", "val", "test"), parts, strict=True):
        _require_every_class(number, side, part)
    sampler = _sampler(parts[0], training.n_way, training.k_shot, training.n_query)
    sampler.sample(rng)  # so that a split without any training episode is found out now
    return Fold(
        number,
        folder,
        *parts,
        ct,
        sampler,
        _evaluation(parts[1], training, training.val_episodes, [number, VAL_EPISODES]),
        _evaluation(parts[2], training, training.test_episodes, [number, TEST_EPISODES]),
    )


def _evaluation(
    part: TileArrays, training: TrainingRecipe, count: int, stream: Sequence[int]
) -> dict[int, list[Episode]]:
    """Draw episodes of all classes, as the deployed bundle will meet them, for every K that fits.

    Raises:
        DatasetError: the K that is trained for does not fit.
    """
    found = {}
    for k in training.shots:
        try:
            found[k] = evaluation_episodes(part, training, k, count, stream)
        except DatasetError:
            if k == training.k_shot:
                raise
    return found


def evaluation_episodes(
    part: TileArrays, training: TrainingRecipe, k_shot: int, count: int, stream: Sequence[int]
) -> list[Episode]:
    """Draw episodes of all classes of one side.

    Args:
        part: the side's tiles.
        training: seed and number of queries.
        k_shot: support tiles a class.
        count: how many episodes; fewer of them are the first of more.
        stream: fold and purpose, as `[1, TEST_EPISODES]`.

    Raises:
        DatasetError: this K does not fit.
    """
    sampler = _sampler(part, None, k_shot, training.test_queries)
    # The K of the recipe keeps its stream, whatever other K stand beside it.
    seed = [training.seed, *stream, *([] if k_shot == training.k_shot else [k_shot])]
    return draw_episodes(sampler, count, seed)


def _sampler(part: TileArrays, n_way: int | None, k_shot: int, n_query: int) -> EpisodeSampler:
    return EpisodeSampler(
        part.labels,
        part.groups,
        part.classes,
        n_way=n_way or len(part.classes),
        k_shot=k_shot,
        n_query=n_query,
    )


def _require_every_class(number: int, side: str, tiles: TileArrays) -> None:
    """A data set's own split may lack a class on one side; an evaluation episode takes them all."""
    present = set(tiles.labels.tolist())
    absent = [name for label, name in enumerate(tiles.classes) if label not in present]
    if absent and tiles.split is not None:
        raise DatasetError(
            f"fold {number}: class '{absent[0]}' has no {side} tile in the data set's own split: "
            f"add some, or leave the split out and folds are made by group"
        )
