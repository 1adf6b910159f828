from __future__ import annotations

import numpy as np
import pytest
import torch

from cdt_train import evaluate
from cdt_train.episodes import EpisodeSampler
from cdt_train.evaluate import (
    colour_statistics,
    draw_episodes,
    metrics,
    noise_ct,
    noise_embeddings,
    paired_difference,
    permuted_labels,
    score_episodes,
    score_in_contexts,
    together,
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


@pytest.mark.parametrize("fit", ["mean", "shrunk", "ridge"])
def test_permuted_labels_are_at_chance_for_every_fit(fit: str) -> None:
    drawn = episodes(400)
    wrong = permuted_labels(drawn, seed=5)
    assert score_episodes(clusters(0.05), wrong, 5.0, fit).accuracy == pytest.approx(0.5, abs=0.05)
    assert score_episodes(clusters(0.05), drawn, 5.0, fit).accuracy == 1.0
    for before, after in zip(drawn, wrong, strict=True):
        assert np.array_equal(np.sort(after.support_labels), before.support_labels)
        assert after.query_labels is before.query_labels
    again = permuted_labels(drawn, seed=5)
    assert all(
        np.array_equal(a.support_labels, b.support_labels)
        for a, b in zip(wrong, again, strict=True)
    )


def test_noise_embeddings_are_at_chance_and_the_same_again() -> None:
    noise = noise_embeddings(len(LABELS), 16, seed=2)
    assert np.allclose(np.linalg.norm(noise, axis=1), 1, atol=1e-6)
    assert score_episodes(noise, episodes(400), 5.0).accuracy == pytest.approx(0.5, abs=0.06)
    assert np.array_equal(noise, noise_embeddings(len(LABELS), 16, seed=2))


def test_noise_in_place_of_a_ct_has_its_range_and_nothing_of_its_form() -> None:
    ramp = np.linspace(-1, 1, 8 * 32 * 32, dtype=np.float32).reshape(1, 1, 8, 32, 32)
    noise = noise_ct(ramp, seed=0)
    assert noise.shape == ramp.shape
    assert noise.dtype == np.float32
    assert noise.min() >= -1
    assert noise.max() <= 1
    assert noise.mean() == pytest.approx(ramp.mean(), abs=0.03)
    assert abs(np.corrcoef(noise.ravel(), ramp.ravel())[0, 1]) < 0.05


def test_contexts_take_turns_without_changing_the_order() -> None:
    drawn = episodes(9)
    good, bad = clusters(0.05), noise_embeddings(len(LABELS), 8, seed=0)
    mixed = score_in_contexts([good, bad], drawn, 5.0)
    plain = score_episodes(good, drawn, 5.0)
    assert np.array_equal(mixed.queries, plain.queries)
    assert np.array_equal(mixed.accuracies[::2], plain.accuracies[::2])
    assert np.array_equal(mixed.accuracies[1::2], score_episodes(bad, drawn, 5.0).accuracies[1::2])
    assert paired_difference(mixed, plain, np.arange(len(LABELS)))["mean"] < 0


def test_pooled_draws_keep_everything() -> None:
    first = score_episodes(clusters(0.3), episodes(3), 5.0)
    pooled = together([first, first])
    assert np.array_equal(pooled.queries, np.tile(first.queries, 2))
    assert pooled.accuracy == pytest.approx(first.accuracy)
    assert pooled.nll == pytest.approx(first.nll)
    assert len(pooled.logits) == len(pooled.truth) == 2 * len(first.truth)
    assert pooled.correct.mean() == pytest.approx(first.correct.mean())


def test_queries_lead_back_to_their_tiles() -> None:
    drawn = episodes(5)
    scores = score_episodes(clusters(0.3), drawn, 5.0)
    assert np.array_equal(LABELS[scores.queries], scores.truth)


def test_the_face_of_evaluation_names_what_it_holds() -> None:
    assert all(hasattr(evaluate, name) for name in evaluate.__all__)


def test_every_metric_of_the_field_is_there_and_right_at_the_ends() -> None:
    found = metrics(score_episodes(clusters(0.05), episodes(), 5.0))
    assert found["episodes"] == 200
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc_roc", "cohen_kappa", "mcc"):
        assert found[name] == 1.0
    assert found["accuracy_ci95"] == 0.0


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
