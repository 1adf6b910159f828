from __future__ import annotations

import numpy as np
import pytest

from cdt_train.intervals import (
    bootstrap_groups,
    over_folds,
    paired_difference,
    pooled_over_folds,
    t_quantile,
    verdict,
)
from cdt_train.scores import EpisodeScores


def row(accuracies: list[float], queries: list[int] | None = None) -> EpisodeScores:
    truth = np.zeros(len(accuracies), np.int64)
    places = np.arange(len(accuracies)) if queries is None else np.array(queries)
    return EpisodeScores(np.array(accuracies), np.zeros((len(truth), 2)), truth, places)


def test_folds_give_a_t_interval() -> None:
    found = over_folds([0.8, 0.9, 1.0])
    assert found["mean"] == pytest.approx(0.9)
    assert found["std"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert found["n"] == 3
    assert over_folds([0.7])["ci95"] == 0.0
    assert t_quantile(0) == 0.0


def test_two_folds_give_the_wide_interval_that_is_due() -> None:
    found = over_folds([0.8, 0.9])
    assert found["std"] == pytest.approx(0.0707, abs=1e-4)
    assert found["ci95"] == pytest.approx(12.706 * 0.05, rel=1e-3)


def test_few_groups_make_a_wider_interval_than_their_many_queries() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 500)
    right = rng.random(3000) < np.array([0.95, 0.9, 0.6, 0.99, 0.7, 0.9])[groups]
    found = bootstrap_groups(right, groups, seed=1)
    assert found["mean"] == pytest.approx(right.mean())
    assert found["groups"] == 6
    alone = bootstrap_groups(right, np.arange(3000), seed=1)
    assert found["high"] - found["low"] > 5 * (alone["high"] - alone["low"])
    assert found["low"] < found["mean"] < found["high"]
    assert found == bootstrap_groups(right, groups, seed=1) != bootstrap_groups(right, groups)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 10)
        right = rng.random(400) < rng.beta(8, 2, 40)[groups]
        found = bootstrap_groups(right, groups, seed=seed, draws=300)
        covered += found["low"] <= 0.8 <= found["high"]
    assert 0.88 < covered / 200 < 0.99


def test_a_difference_can_be_drawn_again_by_group() -> None:
    groups = np.repeat(np.arange(4), 50)
    gains = np.repeat([1.0, 1.0, 0.0, 1.0], 50)
    found = bootstrap_groups(gains - 0.5, groups)
    assert found["mean"] == pytest.approx(0.25)
    assert found["low"] < 0.25 < found["high"] <= 0.5


def test_the_paired_interval_is_narrower_than_the_rows_own() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.7, 0.1, 400)
    gain = rng.normal(0.02, 0.01, 400)
    groups = np.arange(400)
    found = paired_difference(row((hard + gain).tolist()), row(hard.tolist()), groups)
    assert found["mean"] == pytest.approx(gain.mean())
    assert found["ci95"] == pytest.approx(1.96 * gain.std(ddof=1) / 20)
    assert found["episodes"] == 400


def test_a_row_less_itself_is_exactly_nothing() -> None:
    assert paired_difference(row([0.5, 0.7]), row([0.5, 0.7]), np.arange(2)) == {
        "mean": 0.0,
        "ci95": 0.0,
        "episodes": 2,
        "low": 0.0,
        "high": 0.0,
        "groups": 2,
    }


@pytest.mark.parametrize("queries", [[1, 0], [0], []])
def test_rows_of_other_episodes_are_never_paired(queries: list[int]) -> None:
    other = row([0.5] * max(1, len(queries)), queries)
    with pytest.raises(ValueError, match="two scorings of the same episodes, in order"):
        paired_difference(row([0.5, 0.7]), other, np.arange(2))
    with pytest.raises(ValueError, match="two scorings of the same episodes, in order"):
        paired_difference(other, row([0.5, 0.7]), np.arange(2))


def test_folds_are_pooled_over_the_groups_of_all() -> None:
    halves = (0.03, 0.04)
    means = (0.1, 0.2)
    folds = [
        {"mean": mean, "low": mean - half, "high": mean + half, "groups": 20}
        for mean, half in zip(means, halves, strict=True)
    ]
    found = pooled_over_folds(folds)
    assert found["mean"] == pytest.approx(0.15)
    assert found["ci95"] == pytest.approx(0.025)  # the root of .03 squared and .04 squared, halved
    assert found["groups"] == 40


def test_pooled_folds_cover_the_truth_as_often_as_they_say() -> None:
    """Folds that differ from each other in difficulty do not widen a paired difference."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        folds = []
        for _ in range(3):
            groups = np.repeat(np.arange(40), 10)
            change = rng.choice([0.0, 1.0], 40, p=[0.9, 0.1]).repeat(10)
            folds.append(bootstrap_groups(change, groups, draws=300))
        found = pooled_over_folds(folds)
        covered += abs(found["mean"] - 0.1) <= found["ci95"]
    assert 0.86 < covered / 200 < 0.99


@pytest.mark.parametrize(
    ("mean", "half", "words"),
    [
        (0.02, 0.01, "a gain"),
        (-0.02, 0.01, "a loss"),
        (0.02, 0.03, "no difference shown"),
        (0.0, 0.0, "no difference shown"),
    ],
)
def test_the_verdict_follows_the_interval(mean: float, half: float, words: str) -> None:
    assert verdict(mean, half) == words
