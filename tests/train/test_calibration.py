from __future__ import annotations

import numpy as np
import pytest

from cdt_train.calibration import (
    TEMPERATURES,
    calibrate,
    cross_validated_temperature,
    fit_temperature,
)
from cdt_train.metrics import metrics
from cdt_train.scores import EpisodeScores, negative_log_likelihood


def overconfident(factor: float, count: int = 4000, seed: int = 0) -> EpisodeScores:
    """Queries whose logits are `factor` times those that would be right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 2)) * 1.5
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (rng.random(count) < chances[:, 1]).astype(np.int64)
    return EpisodeScores(np.array([0.5, 0.5]), logits * factor, truth, np.arange(count))


@pytest.mark.parametrize("factor", [0.8, 4.0, 9.0])
def test_temperature_repairs_overconfidence(factor: float) -> None:
    scores = overconfident(factor)
    temperature = fit_temperature(scores)
    assert temperature == pytest.approx(factor, rel=0.15)
    fresh = overconfident(factor, seed=1)
    assert metrics(fresh, temperature)["ece"] < 0.03
    if factor > 1:
        assert metrics(fresh)["ece"] > 0.05


def test_the_search_finds_what_a_fine_grid_finds() -> None:
    scores = overconfident(3.0, 500)
    grid = np.exp(np.linspace(np.log(0.5), np.log(20), 2000))
    losses = [negative_log_likelihood(scores.logits / t, scores.truth) for t in grid]
    assert fit_temperature(scores) == pytest.approx(grid[int(np.argmin(losses))], rel=0.015)


def test_certainty_is_not_believed() -> None:
    sure = EpisodeScores(np.ones(2), np.tile([1.0, -1.0], (50, 1)), np.zeros(50, np.int64))
    assert fit_temperature(sure) == pytest.approx(TEMPERATURES[0])
    wrong = EpisodeScores(np.zeros(2), np.tile([9.0, -9.0], (50, 1)), np.ones(50, np.int64))
    assert fit_temperature(wrong) == pytest.approx(TEMPERATURES[1])


def test_every_k_has_a_temperature_of_its_own() -> None:
    found = calibrate({1: overconfident(1.5), 5: overconfident(3.0)})
    assert found == {
        1: pytest.approx(1.5, rel=0.15),
        5: pytest.approx(3.0, rel=0.15),
    }


def test_a_fit_is_judged_on_groups_that_it_has_not_seen() -> None:
    scores = overconfident(4.0)
    found = cross_validated_temperature(scores, np.arange(4000) // 40)
    assert found["temperature"] == fit_temperature(scores)
    assert len(found["temperatures"]) == 5
    assert found["temperatures"] == pytest.approx([4.0] * 5, rel=0.2)
    assert found["ece"] < 0.03 < found["ece_before"]


def test_a_few_tiles_that_flatter_the_fit_are_found_out() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), 100)
    truth = np.zeros(400, np.int64)
    # Each group is wholly right or wholly wrong: nothing fitted to three tells of the fourth.
    sure = np.where(groups == 0, -3.0, 3.0) + 0.1 * rng.normal(size=400)
    scores = EpisodeScores(np.ones(2), np.stack([sure, -sure], axis=1), truth, np.arange(400))
    found = cross_validated_temperature(scores, groups)
    assert len(found["temperatures"]) == 4
    assert max(found["temperatures"]) > 3 * min(found["temperatures"])
    assert found["ece"] > metrics(scores, found["temperature"])["ece"] + 0.05


def test_one_group_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match="calibration tiles of at least two groups"):
        cross_validated_temperature(overconfident(2.0, 50), np.zeros(50, np.int64))
