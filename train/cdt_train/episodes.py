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
        self._tiles = _by_class_and_group(labels, groups)
        self._pools_of = {int(c): np.flatnonzero(labels == c) for c in self.present}
        self._all_single = len(np.unique(groups)) == len(groups)
        self._check()

    def sample(self, rng: np.random.Generator) -> Episode:
        """Draw one episode.

        Raises:
            DatasetError: the groups can't be parted so that both sides hold every class.
        """
        for _ in range(self.ATTEMPTS):
            classes = np.sort(rng.choice(self.present, self.n_way, replace=False))
            if self._all_single:
                return self._draw_single(classes, rng)
            side = self._part_groups(classes, rng)
            if side is not None:
                return self._draw(classes, side, rng)
        raise DatasetError(
            f"no {self.n_way}-way {self.k_shot}-shot episode found whose support and query come "
            f"from different patients or groups: lower --kshot, or add patients to each class"
        )

    def _check(self) -> None:
        if self.n_way > len(self.present):
            raise DatasetError(
                f"{self.n_way} classes are needed and one side of a split holds "
                f"{len(self.present)}: add patients to the rarer classes, or lower --num-folds"
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

    def _part_groups(self, classes: Ints, rng: np.random.Generator) -> dict[int, bool] | None:
        """Give each group a side: True for support, False for query.

        Class by class, groups are taken until the support side holds k_shot tiles and the query
        side one; the groups that no class needed then go either way. None where a class runs out.
        """
        side: dict[int, bool] = {}
        for c in rng.permutation(classes):
            mine = rng.permutation([g for kind, g in self._tiles if kind == c])
            for support, needed in ((True, self.k_shot), (False, 1)):
                held = sum(len(self._tiles[c, g]) for g in mine if side.get(g) is support)
                for g in mine:
                    if held >= needed:
                        break
                    if g not in side:
                        side[int(g)] = support
                        held += len(self._tiles[c, g])
                if held < needed:
                    return None
        rest = sorted({g for c, g in self._tiles if c in classes} - set(side))
        return side | {g: bool(rng.random() < 0.5) for g in rest}

    def _pools(self, classes: Ints, side: dict[int, bool], support: bool) -> list[Ints]:
        """Tiles of each class whose group is on one side."""
        return [
            np.concatenate(
                [t for (k, g), t in self._tiles.items() if k == c and side[g] is support]
            )
            for c in classes
        ]

    def _draw(self, classes: Ints, side: dict[int, bool], rng: np.random.Generator) -> Episode:
        support_pools, query_pools = (
            self._pools(classes, side, support) for support in (True, False)
        )
        n_query = min(self.n_query, *(len(pool) for pool in query_pools))
        return self._episode(
            classes,
            [rng.choice(pool, self.k_shot, False) for pool in support_pools],
            [rng.choice(pool, n_query, False) for pool in query_pools],
        )

    def _draw_single(self, classes: Ints, rng: np.random.Generator) -> Episode:
        """Draw where each tile is a group of its own: then any tiles may be apart."""
        pools = [self._pools_of[int(c)] for c in classes]
        n_query = min(self.n_query, *(len(pool) - self.k_shot for pool in pools))
        drawn = [rng.choice(pool, self.k_shot + n_query, False) for pool in pools]
        return self._episode(
            classes, [d[: self.k_shot] for d in drawn], [d[self.k_shot :] for d in drawn]
        )

    def _episode(self, classes: Ints, support: Sequence[Ints], query: Sequence[Ints]) -> Episode:
        ways = np.arange(self.n_way, dtype=np.int64)
        return Episode(
            support=np.concatenate(support),
            support_labels=ways.repeat(self.k_shot),
            query=np.concatenate(query),
            query_labels=ways.repeat(len(query[0])),
            classes=classes,
        )


def _by_class_and_group(labels: Ints, groups: Ints) -> dict[tuple[int, int], Ints]:
    """Tiles of each class and group, ascending; the keys too."""
    order = np.lexsort((groups, labels))
    pairs = np.stack([labels[order], groups[order]], axis=1)
    starts = np.flatnonzero(np.any(np.diff(pairs, axis=0), axis=1)) + 1
    parts = np.split(order, starts)
    return {(int(labels[part[0]]), int(groups[part[0]])): part for part in parts if len(part)}


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
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_groups = len(np.unique(groups))
    if n_groups < num_folds:
        raise DatasetError(
            f"{n_groups} patients (or groups) can't make {num_folds} folds: lower --num-folds"
        )
    fewest = int(np.bincount(labels)[np.unique(labels)].min())
    if fewest < num_folds:
        raise DatasetError(
            f"the rarest class has {fewest} tile(s), too few for {num_folds} folds: add tiles "
            f"or lower --num-folds"
        )
    if n_groups == len(groups):  # the splitter for groups would take minutes for 50,000 of them
        plain = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
        return [test.astype(np.int64) for _, test in plain.split(labels, labels)]
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return [test.astype(np.int64) for _, test in splitter.split(labels, labels, groups)]


def hold_out_groups(
    labels: Ints, groups: Ints, share: float, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Part tiles into those of about `share` of the groups and the rest.

    Every class keeps two groups on both sides: two are held out of each class first, then others up
    to the share.

    Returns:
        Indices of the rest, and of the held-out tiles.

    Raises:
        DatasetError: a class has too few groups.
    """
    of_class = {int(c): np.unique(groups[labels == c]) for c in np.unique(labels)}
    classes_of: dict[int, list[int]] = {}
    for label, members in of_class.items():
        for group in members.tolist():
            classes_of.setdefault(group, []).append(label)
    wanted = round(share * len(classes_of))
    for _ in range(200):
        held: set[int] = set()
        for label in rng.permutation(np.array([*of_class], dtype=np.int64)):
            mine = rng.permutation(of_class[int(label)])
            lacking = 2 - len(held & set(mine.tolist()))
            held |= set([g for g in mine.tolist() if g not in held][: max(0, lacking)])
        left = {c: len(set(members.tolist()) - held) for c, members in of_class.items()}
        spare = [g for g in rng.permutation(np.unique(groups)).tolist() if g not in held]
        for group in spare:
            if len(held) >= wanted:
                break
            if min(left.values()) >= 2 and all(left[c] > 2 for c in classes_of[group]):
                held.add(group)
                left = {c: n - (c in classes_of[group]) for c, n in left.items()}
        if min(left.values()) >= 2:
            chosen = np.isin(groups, sorted(held))
            return np.flatnonzero(~chosen), np.flatnonzero(chosen)
    fewest = min(len(members) for members in of_class.values())
    raise DatasetError(
        f"outside the test fold a class comes from {fewest} patients (or groups); training and "
        f"validation take two of each class: add patients or lower --num-folds"
    )
