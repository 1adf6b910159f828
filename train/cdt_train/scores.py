"""Episodes scored: the same seeded tasks for every method that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.prototypes import fit_prototypes, softmax
from cdt_train.episodes import Episode, EpisodeSampler

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


def _none() -> Ints:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class EpisodeScores:
    """Outcome of many episodes.

    Attributes:
        accuracies: `(n_episodes,)`.
        logits: `(n_queries, K)`, all episodes after one another.
        truth: `(n_queries,)`, class within the episode.
        queries: `(n_queries,)`, index of each query tile; it tells whether two methods met the same
            episodes, and `groups[queries]` are the groups that a bootstrap draws. Empty if unknown.
    """

    accuracies: Doubles
    logits: Doubles
    truth: Ints
    queries: Ints = field(default_factory=_none)

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the episodes."""
        return float(self.accuracies.mean())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """`(n_queries,)`, whether each query is classified rightly."""
        result: NDArray[np.bool_] = self.logits.argmax(axis=1) == self.truth
        return result

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the true class."""
        return negative_log_likelihood(self.logits, self.truth)


def draw_episodes(sampler: EpisodeSampler, count: int, seed: Sequence[int]) -> list[Episode]:
    """Draw a fixed list of episodes, so that every method meets the same ones."""
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def score_episodes(
    embeddings: Floats, episodes: Sequence[Episode], scale: float, fit: str = "mean"
) -> EpisodeScores:
    """Classify each episode's queries by what its support set gives.

    Args:
        embeddings: `(n, E)` unit vectors of all tiles that the episodes index.
        episodes: what `draw_episodes` gave.
        scale: factor of the negative squared distance.
        fit: how the support becomes prototypes, a key of `cdt_runtime.prototypes.FITS`.
    """
    return score_in_contexts([embeddings], episodes, scale, fit)


def score_in_contexts(
    contexts: Sequence[Floats], episodes: Sequence[Episode], scale: float, fit: str = "mean"
) -> EpisodeScores:
    """Score episodes that take turns between CT contexts, in the order they were drawn.

    The order matters: differences between two methods are paired by episode.

    Args:
        contexts: the same tiles embedded in each context; episode i sees number i modulo their
            count.
        episodes: as `score_episodes` takes them.
        scale: as there.
        fit: as there.
    """
    logits = [
        _logits(contexts[turn % len(contexts)], episode, scale, fit)
        for turn, episode in enumerate(episodes)
    ]
    accuracies = [
        float((scores.argmax(axis=1) == episode.query_labels).mean())
        for scores, episode in zip(logits, episodes, strict=True)
    ]
    return EpisodeScores(
        np.array(accuracies),
        np.concatenate(logits),
        np.concatenate([episode.query_labels for episode in episodes]),
        np.concatenate([episode.query for episode in episodes]),
    )


def together(parts: Sequence[EpisodeScores]) -> EpisodeScores:
    """Put the episodes of several scorings after one another, such as draws for calibration."""
    return EpisodeScores(
        np.concatenate([part.accuracies for part in parts]),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.queries for part in parts]),
    )


def negative_log_likelihood(logits: Doubles, truth: Ints) -> float:
    """Mean negative log-likelihood of the true class."""
    chances = softmax(logits)[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(chances, 1e-12, None)).mean())


def _logits(embeddings: Floats, episode: Episode, scale: float, fit: str) -> Doubles:
    prototypes = fit_prototypes(
        embeddings[episode.support], episode.support_labels, len(episode.classes), fit
    )
    queries = embeddings[episode.query].astype(np.float64)
    result: Doubles = -scale * (2.0 - 2.0 * queries @ prototypes.T)
    return result
