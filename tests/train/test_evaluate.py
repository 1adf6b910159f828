from __future__ import annotations

import numpy as np
import pytest
import torch

from cdt_train.episodes import EpisodeSampler
from cdt_train.evaluate import (
    EpisodeScores,
    colour_statistics,
    draw_episodes,
    expected_calibration_error,
    fit_temperature,
    metrics,
    over_folds,
    score_episodes,
    t_quantile,
)

LABELS = np.tile([0, 1], 60)
GROUPS = np.repeat(np.arange(10), 12)


def clusters(spread: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = np.eye(2, 8)[LABELS] + spread * rng.normal(size=(len(LABELS), 8))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def episodes(count: int = 200) -> list:
    sampler = EpisodeSampler(LABELS, GROUPS, ("a", "b"), n_way=None, k_shot=3, n_query=5)
    return draw_episodes(sampler, count, [0])


def test_clear_clusters_are_found_and_noise_is_at_chance() -> None:
    assert score_episodes(clusters(0.05), episodes(), 5.0).accuracy == 1.0
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(len(LABELS), 8)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert score_episodes(noise, episodes(), 5.0).accuracy == pytest.approx(0.5, abs=0.06)


def test_shuffled_labels_are_at_chance() -> None:
    wrong = np.random.default_rng(3).permutation(LABELS)
    sampler = EpisodeSampler(wrong, GROUPS, ("a", "b"), n_way=None, k_shot=3, n_query=3)
    scores = score_episodes(clusters(0.05), draw_episodes(sampler, 300, [0]), 5.0)
    assert scores.accuracy == pytest.approx(0.5, abs=0.07)


def test_every_metric_of_the_field_is_there_and_right_at_the_ends() -> None:
    found = metrics(score_episodes(clusters(0.05), episodes(), 5.0))
    assert found["episodes"] == 200
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc_roc", "cohen_kappa", "mcc"):
        assert found[name] == 1.0
    assert found["accuracy_ci95"] == 0.0


def test_more_than_two_classes_have_a_macro_auc() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    logits = np.eye(3)[truth] * 2 + rng.normal(size=(300, 3))
    found = metrics(EpisodeScores(np.full(10, 0.8), logits, truth))
    assert 0.7 < found["auc_roc"] < 1


def test_the_interval_over_episodes_is_the_standard_one() -> None:
    accuracies = np.array([0.8, 1.0, 0.6, 0.8])
    scores = EpisodeScores(accuracies, np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]))
    assert metrics(scores)["accuracy_ci95"] == pytest.approx(1.96 * np.std(accuracies, ddof=1) / 2)


def test_temperature_repairs_overconfidence() -> None:
    rng = np.random.default_rng(0)
    true_logits = rng.normal(size=(4000, 2)) * 1.5
    chances = np.exp(true_logits) / np.exp(true_logits).sum(axis=1, keepdims=True)
    truth = (rng.random(4000) < chances[:, 1]).astype(np.int64)
    scores = EpisodeScores(np.array([0.5, 0.5]), true_logits * 4, truth)
    assert fit_temperature(scores) == pytest.approx(4, rel=0.15)
    assert metrics(scores, 4.0)["ece"] < 0.03 < metrics(scores)["ece"]


def test_calibration_error_by_hand() -> None:
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert expected_calibration_error(chances, np.array([0, 1, 1, 1])) == pytest.approx(0.4)


def test_folds_give_a_t_interval() -> None:
    found = over_folds([0.8, 0.9, 1.0])
    assert found["mean"] == pytest.approx(0.9)
    assert found["std"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert over_folds([0.7])["ci95"] == 0.0
    assert t_quantile(0) == 0.0


def test_colour_statistics_see_colour_and_not_place() -> None:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (6, 2, 28, 28), generator=generator).to(torch.uint8)
    reference = torch.randint(0, 200, (8, 2, 28, 28), generator=generator).to(torch.uint8)
    embedded = colour_statistics(tiles, reference)
    assert embedded.shape == (6, 14)
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    flat = tiles.flatten(2)
    moved = flat.roll(7 * 28, dims=-1).reshape(tiles.shape)
    assert np.allclose(colour_statistics(moved, reference), embedded, atol=1e-5)
    assert not np.allclose(colour_statistics(tiles // 2, reference), embedded, atol=1e-2)
