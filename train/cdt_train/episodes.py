"""Few-shot episodes and folds: every draw hangs on a seed, no group is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Episode:
    """One n-way k-shot task.

    Attributes:
        support: indices of the support tiles, `n_way * k_shot` of them.
        support_labels: their classes within the episode, 0 to `n_way` - 1.
        query: indices of the query tiles, as many of each class.
        query_labels: their classes within the episode.
        classes: the episode's classes as the data set numbers them, ascending.
    """

    support: Ints
    support_labels: Ints
    query: Ints
    query_labels: Ints
    classes: Ints


class EpisodeSampler:
    """Draws episodes whose support and query share no group.

    Args:
        labels: `(n,)` class of each tile.
        groups: `(n,)` patient (or group) of each tile.
        class_names: names by class number, for messages.
        n_way: classes in an episode, or None for all that occur.
        k_shot: support tiles a class.
        n_query: query tiles a class; fewer where an episode's groups hold fewer.

    Raises:
        DatasetError: no episode can be drawn.
    """

    ATTEMPTS = 100

    def __init__(
        self,
        labels: Ints,
        groups: Ints,
        class_names: Sequence[str],
        *,
        n_way: int | None,
        k_shot: int,
        n_query: int,
    ) -> None:
        self.labels, self.groups = labels, groups
        self.present = np.unique(labels)
        self.n_way = n_way or len(self.present)
        self.k_shot, self.n_query = k_shot, n_query
        self._names = class_names
        self._check()

    def sample(self, rng: np.random.Generator) -> Episode:
        """Draw one episode.

        Raises:
            DatasetError: the groups can't be parted so that both sides hold every class.
        """
        for _ in range(self.ATTEMPTS):
            classes = np.sort(rng.choice(self.present, self.n_way, replace=False))
            sides = self._part_groups(classes, rng)
            if sides is not None:
                return self._draw(classes, sides, rng)
        raise DatasetError(
            f"no {self.n_way}-way {self.k_shot}-shot episode found whose support and query come "
            f"from different patients or groups: lower --kshot, or add patients to each class"
        )

    def _check(self) -> None:
        if self.n_way > len(self.present):
            raise DatasetError(
                f"training.n_way: {self.n_way} classes asked for, the split holds "
                f"{len(self.present)}: lower it"
            )
        for label in self.present:
            mine = self.labels == label
            count, n_groups = int(mine.sum()), len(np.unique(self.groups[mine]))
            if count < self.k_shot + 1:
                raise DatasetError(
                    f"class {self._names[label]!r} has {count} tiles in a split; an episode takes "
                    f"k_shot + 1 = {self.k_shot + 1}: lower --kshot or add tiles"
                )
            if n_groups < 2:
                raise DatasetError(
                    f"class {self._names[label]!r} comes from {n_groups} patient or group in a "
                    f"split; support and query must not share one: add patients, or lower "
                    f"--num-folds"
                )

    def _part_groups(self, classes: Ints, rng: np.random.Generator) -> tuple[Ints, Ints] | None:
        """Cut the groups in two: support side (at least k_shot a class) and query side."""
        relevant = np.isin(self.labels, classes)
        order = rng.permutation(np.unique(self.groups[relevant]))
        counts = np.array(
            [[np.sum((self.groups == g) & (self.labels == c)) for c in classes] for g in order]
        )
        enough = np.all(counts.cumsum(axis=0) >= self.k_shot, axis=1)
        left = np.all(counts[::-1].cumsum(axis=0)[::-1] >= 1, axis=1)
        cuts = np.flatnonzero(enough[:-1] & left[1:]) + 1
        if len(cuts) == 0:
            return None
        cut = int(rng.choice(cuts))
        return order[:cut], order[cut:]

    def _draw(self, classes: Ints, sides: tuple[Ints, Ints], rng: np.random.Generator) -> Episode:
        support_pools, query_pools = (
            [np.flatnonzero((self.labels == c) & np.isin(self.groups, side)) for c in classes]
            for side in sides
        )
        n_query = min(self.n_query, *(len(pool) for pool in query_pools))
        ways = np.arange(self.n_way, dtype=np.int64)
        return Episode(
            support=np.concatenate([rng.choice(p, self.k_shot, False) for p in support_pools]),
            support_labels=ways.repeat(self.k_shot),
            query=np.concatenate([rng.choice(p, n_query, False) for p in query_pools]),
            query_labels=ways.repeat(n_query),
            classes=classes,
        )


def group_folds(labels: Ints, groups: Ints, num_folds: int, seed: int) -> list[Ints]:
    """Part the groups into folds whose classes are as balanced as the groups allow.

    Args:
        labels: `(n,)`.
        groups: `(n,)`.
        num_folds: at least 2.
        seed: of the shuffle.

    Returns:
        For each fold, the indices of its test tiles; together they are all tiles, once each.

    Raises:
        DatasetError: there are fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = len(np.unique(groups))
    if n_groups < num_folds:
        raise DatasetError(
            f"{n_groups} patients (or groups) can't make {num_folds} folds: lower --num-folds"
        )
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return [test.astype(np.int64) for _, test in splitter.split(labels, labels, groups)]


def hold_out_groups(
    labels: Ints, groups: Ints, share: float, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Part tiles into those of `share` of the groups, at least two, and the rest.

    A draw in which either side lacks a class, or holds it in one group only, is drawn again.

    Returns:
        Indices of the rest, and of the held-out tiles.

    Raises:
        DatasetError: no draw leaves every class with two groups on both sides.
    """
    names = np.unique(groups)
    count = max(2, round(share * len(names)))
    for _ in range(200):
        held = np.isin(groups, rng.choice(names, min(count, len(names)), replace=False))
        if _all_classes_twice(labels, groups, held) and _all_classes_twice(labels, groups, ~held):
            return np.flatnonzero(~held), np.flatnonzero(held)
    raise DatasetError(
        f"{len(names)} patients (or groups) outside the test fold can't be parted into training "
        f"and validation with every class in two of each: add patients or lower --num-folds"
    )


def _all_classes_twice(labels: Ints, groups: Ints, chosen: NDArray[np.bool_]) -> bool:
    return all(
        len(np.unique(groups[chosen & (labels == label)])) >= 2 for label in np.unique(labels)
    )
