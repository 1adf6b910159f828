"""What any model has to beat, and what has to come out at chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_train.episodes import Episode
from cdt_train.scores import Floats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
    return _unit(standard)


def permuted_labels(episodes: Sequence[Episode], seed: int) -> list[Episode]:
    """Permute the support labels within each episode: any method must fall to chance.

    One that does not has found the query labels by another way than the support.
    """
    rng = np.random.default_rng(seed)
    return [
        replace(episode, support_labels=rng.permutation(episode.support_labels))
        for episode in episodes
    ]


def noise_embeddings(count: int, width: int, seed: int) -> Floats:
    """Random unit vectors `(count, width)`, the same for the same seed: at chance."""
    return _unit(np.random.default_rng(seed).normal(size=(count, width)))


def noise_ct(volume: Floats, seed: int) -> Floats:
    """Noise with a volume's mean, spread and range: a context that says nothing.

    Args:
        volume: any shape; usually the CT input `(1, W, D, S, S)`.
        seed: of the noise.
    """
    drawn = np.random.default_rng(seed).normal(volume.mean(), volume.std(), volume.shape)
    return np.clip(drawn, volume.min(), volume.max()).astype(np.float32)


def _unit(rows: NDArray[np.float64]) -> Floats:
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    result: Floats = (rows / norms).astype(np.float32)
    return result


def _channel_statistics(tiles: Tensor) -> NDArray[np.float64]:
    return np.concatenate([_statistics_of(part.numpy()) for part in torch.split(tiles, 64)])


def _statistics_of(tiles: NDArray[Any]) -> NDArray[np.float64]:
    pixels = tiles.reshape(len(tiles), tiles.shape[1], -1)
    quantiles = np.quantile(pixels[:, :, ::7], QUANTILES, axis=2)  # (Q, n, M)
    parts = [pixels.mean(axis=2), pixels.std(axis=2), *quantiles]
    return np.concatenate(parts, axis=1)
