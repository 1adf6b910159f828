"""The limit beyond which tiles are unlike the training tiles, and what the bundle says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cdt_export.reference import ACCEPTED, Seen, fit_reference
from cdt_runtime.bundle import Bundle
from cdt_runtime.tile_statistics import statistics_count

SIZE = statistics_count(3)


def some(groups: int, seed: int, shift: float = 0.0) -> Seen:
    """Three tiles a group, of two classes; groups differ more than tiles of one do."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(SIZE, SIZE))
    of_group = rng.normal(size=(groups, SIZE)).repeat(3, axis=0)
    own = rng.normal(scale=0.3, size=(3 * groups, SIZE))
    labels = np.arange(groups).repeat(3) % 2
    statistics = (of_group + own) @ mixing + 2.0 * labels[:, None] + shift
    densities = np.ones((3 * groups, 2, 3), np.float32)
    return Seen(statistics.astype(np.float32), labels, np.arange(groups).repeat(3), densities)


def test_tiles_of_new_groups_pass_as_often_as_asked() -> None:
    reference, facts = fit_reference(some(150, 0), 3)
    new = some(400, 1)
    passed = (reference.unlikeness(new.statistics, new.statistics[:0]) <= 1).mean()
    assert abs(passed - ACCEPTED) < 0.03
    assert facts == {
        "tiles": 450,
        "groups": 150,
        "accepted": ACCEPTED,
        "limit": float(reference.limit[0]),
    }


def test_tiles_that_lie_elsewhere_do_not_pass() -> None:
    reference, _ = fit_reference(some(150, 0), 3)
    shifted = some(100, 1, shift=30.0)
    assert (reference.unlikeness(shifted.statistics, shifted.statistics[:0]) > 1).mean() > 0.99


def test_few_groups_give_a_wide_limit_not_a_failure() -> None:
    few = some(3, 0)
    reference, _ = fit_reference(few, 3)
    new = some(100, 1)
    assert (reference.unlikeness(new.statistics, new.statistics[:0]) <= 1).mean() > 0.5


def test_the_bundle_says_how_many_held_out_tiles_are_refused(bundle_dir: Path) -> None:
    facts = Bundle.open(bundle_dir).manifest["reference"]
    assert facts["held_out"] > 0
    assert facts["held_out_refused"] <= 0.25 * facts["held_out"]
