"""Folds: which tiles and volumes train, choose and test; every episode drawn before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_train.config import Recipe
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.data.load import LoadedData
from cdt_train.episodes import Episode, EpisodeSampler, group_folds, hold_out_groups
from cdt_train.evaluate import draw_episodes

HOLD_OUT, VAL_EPISODES, TEST_EPISODES, TEST_CT, SUPPORT = range(5)
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
        val_episodes: fixed episodes over `val`, of all classes.
        test_episodes: fixed episodes over `test`, of all classes.
    """

    number: int
    folder: Path
    train: TileArrays
    val: TileArrays
    test: TileArrays
    ct: CtArrays
    sampler: EpisodeSampler
    val_episodes: list[Episode]
    test_episodes: list[Episode]

    @property
    def split(self) -> dict[str, list[str]]:
        """Names of the tiles on each side."""
        return {side: list(getattr(self, side).names) for side in ("train", "val", "test")}


def make_folds(recipe: Recipe, data: LoadedData, output_dir: Path) -> list[Fold]:
    """Part the data into folds by patient (or group) and draw every evaluation episode.

    Raises:
        DatasetError: the patients, tiles or volumes do not suffice; nothing was trained yet.
    """
    training = recipe.training
    tests = group_folds(data.tiles.labels, data.tiles.groups, training.num_folds, training.seed)
    return [
        _make_fold(number, output_dir / f"fold_{number}", recipe, data, test)
        for number, test in enumerate(tests, start=1)
    ]


def _make_fold(
    number: int, folder: Path, recipe: Recipe, data: LoadedData, test: NDArray[np.int64]
) -> Fold:
    training, tiles = recipe.training, data.tiles
    rest = np.setdiff1d(np.arange(len(tiles)), test)
    rng = np.random.default_rng([training.seed, number, HOLD_OUT])
    train, val = hold_out_groups(tiles.labels[rest], tiles.groups[rest], training.val_share, rng)
    held = np.unique(tiles.groups[np.concatenate([rest[val], test])])
    ct = data.ct.without(data.patients[g] for g in held)
    if len(ct) == 0:
        raise DatasetError(
            f"fold {number}: every CT in ct_data is of a validation or test patient, so training "
            f"would have none: add CT series of other patients, or lower --num-folds"
        )
    parts = (tiles.take(rest[train]), tiles.take(rest[val]), tiles.take(test))
    # Evaluation meets all classes, as the deployed bundle will.
    samplers = [
        EpisodeSampler(
            part.labels,
            part.groups,
            part.classes,
            n_way=n_way,
            k_shot=training.k_shot,
            n_query=n_query,
        )
        for part, n_way, n_query in (
            (parts[0], training.n_way or len(tiles.classes), training.n_query),
            (parts[1], len(tiles.classes), training.test_queries),
            (parts[2], len(tiles.classes), training.test_queries),
        )
    ]
    samplers[0].sample(rng)  # so that a split without any training episode is found out now
    return Fold(
        number,
        folder,
        *parts,
        ct,
        samplers[0],
        draw_episodes(samplers[1], training.val_episodes, [training.seed, number, VAL_EPISODES]),
        draw_episodes(samplers[2], training.test_episodes, [training.seed, number, TEST_EPISODES]),
    )
