"""Honest few-shot evaluation: seeded episodes, intervals, baselines, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_runtime.prototypes import class_means, softmax
from cdt_train.episodes import Episode, EpisodeSampler

Floats = NDArray[np.float32]

TEMPERATURES = (0.5, 20.0)
"""Bounds of the fitted temperature."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class EpisodeScores:
    """Outcome of many episodes.

    Attributes:
        accuracies: `(n_episodes,)`.
        logits: `(n_queries, K)`, all episodes after one another.
        truth: `(n_queries,)`, class within the episode.
    """

    accuracies: NDArray[np.float64]
    logits: NDArray[np.float64]
    truth: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the episodes."""
        return float(self.accuracies.mean())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the true class."""
        return negative_log_likelihood(self.logits, self.truth)


def draw_episodes(sampler: EpisodeSampler, count: int, seed: Sequence[int]) -> list[Episode]:
    """Draw a fixed list of episodes, so that every method meets the same ones."""
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def score_episodes(embeddings: Floats, episodes: Sequence[Episode], scale: float) -> EpisodeScores:
    """Classify each episode's queries by their nearest prototype.

    Args:
        embeddings: `(n, E)` unit vectors of all tiles that the episodes index.
        episodes: what `draw_episodes` gave.
        scale: factor of the negative squared distance.
    """
    accuracies, logits, truth = [], [], []
    for episode in episodes:
        support = embeddings[episode.support]
        means = class_means(support, episode.support_labels, len(episode.classes))
        scores = -scale * (2.0 - 2.0 * embeddings[episode.query].astype(np.float64) @ means.T)
        accuracies.append(float((scores.argmax(axis=1) == episode.query_labels).mean()))
        logits.append(scores)
        truth.append(episode.query_labels)
    return EpisodeScores(np.array(accuracies), np.concatenate(logits), np.concatenate(truth))


def metrics(scores: EpisodeScores, temperature: float = 1.0) -> dict[str, Any]:
    """Compute every metric of one fold.

    `accuracy` is the mean over episodes and `accuracy_ci95` its half-width over episodes; the other
    figures are over all queries of all episodes.

    Args:
        scores: of episodes with the same number of classes.
        temperature: divides the logits before they become probabilities.
    """
    from sklearn import metrics as sk

    chances = softmax(scores.logits / temperature)
    predicted = chances.argmax(axis=1)
    ways = chances.shape[1]
    ranked = chances[:, 1] if ways == 2 else chances
    count = len(scores.accuracies)
    return {
        "episodes": count,
        "accuracy": scores.accuracy,
        "accuracy_ci95": float(1.96 * scores.accuracies.std(ddof=1) / math.sqrt(count)),
        "balanced_accuracy": float(sk.balanced_accuracy_score(scores.truth, predicted)),
        "macro_f1": float(sk.f1_score(scores.truth, predicted, average="macro")),
        "auc_roc": float(sk.roc_auc_score(scores.truth, ranked, multi_class="ovr")),
        "cohen_kappa": float(sk.cohen_kappa_score(scores.truth, predicted)),
        "mcc": float(sk.matthews_corrcoef(scores.truth, predicted)),
        "ece": expected_calibration_error(chances, scores.truth),
    }


def fit_temperature(scores: EpisodeScores) -> float:
    """Find the temperature with the least negative log-likelihood.

    A fine grid from 0.5 to 20. A few validation patients that are all classified rightly would ask
    for an ever lower temperature, that is, for certainty: below 0.5 they are not believed.
    """
    grid = np.exp(np.linspace(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]), 200))
    losses = [negative_log_likelihood(scores.logits / t, scores.truth) for t in grid]
    return float(grid[int(np.argmin(losses))])


def negative_log_likelihood(logits: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of the true class."""
    chances = softmax(logits)[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(chances, 1e-12, None)).mean())


def expected_calibration_error(
    chances: NDArray[np.float64], truth: NDArray[np.int64], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their size.

    Source: Guo et al. 2017, eq. 3.
    """
    confidence = chances.max(axis=1)
    right = chances.argmax(axis=1) == truth
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    weights = np.bincount(which, minlength=bins)
    gap = np.abs(
        np.bincount(which, weights=confidence, minlength=bins)
        - np.bincount(which, weights=right, minlength=bins)
    )
    return float(gap.sum() / weights.sum())


def over_folds(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation and half-width of the 95 % t-interval over folds."""
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return {
        "mean": float(array.mean()),
        "std": spread,
        "ci95": t_quantile(len(array) - 1) * spread / math.sqrt(len(array)),
    }


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; 0 for no degree of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else 0.0


def colour_statistics(tiles: Tensor, reference: Tensor) -> Floats:
    """Embed tiles by their channels' histograms alone: what any model has to beat.

    Mean, standard deviation and five quantiles of each channel, standardised by those of the
    reference tiles.

    Args:
        tiles: `(n, M, S, S)`.
        reference: training tiles, for mean and spread of each statistic.

    Returns:
        `(n, 7 M)` float32 unit vectors.
    """
    found, known = _channel_statistics(tiles), _channel_statistics(reference)
    standard = (found - known.mean(axis=0)) / np.maximum(known.std(axis=0), 1e-6)
    norms = np.maximum(np.linalg.norm(standard, axis=1, keepdims=True), 1e-6)
    result: Floats = (standard / norms).astype(np.float32)
    return result


def _channel_statistics(tiles: Tensor) -> NDArray[np.float64]:
    return np.concatenate([_statistics_of(part.numpy()) for part in torch.split(tiles, 64)])


def _statistics_of(tiles: NDArray[Any]) -> NDArray[np.float64]:
    pixels = tiles.reshape(len(tiles), tiles.shape[1], -1)
    quantiles = np.quantile(pixels[:, :, ::7], QUANTILES, axis=2)  # (Q, n, M)
    parts = [pixels.mean(axis=2), pixels.std(axis=2), *quantiles]
    return np.concatenate(parts, axis=1)
