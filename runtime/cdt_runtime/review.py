"""What a support set says of itself: how well its tiles are told apart, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.prototypes import fit_prototypes, softmax

Float = NDArray[np.float32]

MAX_FOLDS = 50
"""Tiles are left out one by one up to this number, in as many groups beyond."""

SURE = 0.8
"""Probability of another class from which on a tile looks mislabelled."""

ALIKE = 0.99
"""Cosine of what the encoder says of two tiles, less that of all, from which on they look like
copies. Embeddings would not do: those of a class lie close together."""

CONFUSED = 0.2
"""Share of two classes' tiles that are taken for the other, from which on they are too close."""


@dataclass(frozen=True)
class Doubtful:
    """A support tile that the others of its class do not speak for.

    Attributes:
        place: in the support set.
        label: its class.
        nearest: class that it is taken for when it is left out.
        probability: of that.
    """

    place: int
    label: str
    nearest: str
    probability: float


@dataclass(frozen=True)
class Close:
    """Two classes that are taken for each other.

    Attributes:
        first: a class.
        second: the other.
        share: of their tiles that is taken for the other class when left out.
    """

    first: str
    second: str
    share: float


@dataclass(frozen=True)
class Review:
    """How well the tiles of a support set are told apart by the others.

    Attributes:
        accuracy: mean over classes of the share of tiles that get their class when left out; None
            where no class has two tiles.
        tested: number of tiles that could be left out.
        doubtful: tiles that look mislabelled.
        close: classes that come too close.
        copies: pairs of tiles that are all but the same.
    """

    accuracy: float | None
    tested: int
    doubtful: tuple[Doubtful, ...]
    close: tuple[Close, ...]
    copies: tuple[tuple[int, int], ...]


def review(
    embeddings: Float,
    tokens: Float,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    fit: str,
    scale: float,
) -> Review:
    """Leave each tile out in turn, and classify it by the others.

    Tiles that are alone in their class can't be left out.

    Args:
        embeddings: `(S, E)` unit vectors.
        tokens: `(S, N, C)`, that they were made of.
        labels: `(S,)` class indices.
        classes: their K names.
        fit: how prototypes are made, a key of `FITS`.
        scale: factor of the negative squared distance in the logits.
    """
    chances = left_out(embeddings, labels, len(classes), fit, scale)
    tested = ~np.isnan(chances[:, 0])
    found = np.where(tested, np.nan_to_num(chances).argmax(axis=1), -1)
    right = found == labels
    shares = [
        right[mine].mean() for k in range(len(classes)) if (mine := tested & (labels == k)).any()
    ]
    return Review(
        accuracy=float(np.mean(shares)) if shares else None,
        tested=int(tested.sum()),
        doubtful=tuple(
            Doubtful(
                int(place),
                classes[labels[place]],
                classes[found[place]],
                float(chances[place, found[place]]),
            )
            for place in np.flatnonzero(tested & ~right)
            if chances[place, found[place]] >= SURE
        ),
        close=tuple(_close(labels, found, classes)),
        copies=tuple(_copies(tokens)),
    )


def left_out(
    embeddings: Float, labels: NDArray[np.int64], n_classes: int, fit: str, scale: float
) -> NDArray[np.float64]:
    """Probabilities of each support tile by the others, `(S, K)`; NaN where it is alone.

    Args:
        embeddings: `(S, E)` unit vectors.
        labels: `(S,)` class indices.
        n_classes: K.
        fit: how prototypes are made, a key of `FITS`.
        scale: factor of the negative squared distance in the logits.
    """
    counts = np.bincount(labels, minlength=n_classes)
    chances = np.full((len(labels), n_classes), np.nan)
    for fold in _folds(labels, counts):
        kept = fit_prototypes(embeddings[~fold], labels[~fold], n_classes, fit)
        squared = 2.0 - 2.0 * embeddings[fold] @ kept.T
        chances[fold] = softmax(-scale * squared)
    return chances


def _folds(labels: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
    """Groups of tiles to leave out; each class keeps at least one tile."""
    free = np.flatnonzero(counts[labels] > 1)
    if len(free) <= MAX_FOLDS:
        groups = [[place] for place in free]
    else:
        ordered = free[np.argsort(labels[free], kind="stable")]
        groups = [list(ordered[start::MAX_FOLDS]) for start in range(MAX_FOLDS)]
    for group in groups:
        fold = np.zeros(len(labels), bool)
        fold[group] = True
        for k in np.unique(labels[fold]):
            mine = np.flatnonzero(fold & (labels == k))
            if len(mine) == counts[k]:
                fold[mine[0]] = False
        yield fold


def _close(
    labels: NDArray[np.int64], found: NDArray[np.int64], classes: Sequence[str]
) -> Iterator[Close]:
    for first in range(len(classes)):
        for second in range(first + 1, len(classes)):
            of_both = (found >= 0) & ((labels == first) | (labels == second))
            swapped = of_both & ((found == first) | (found == second)) & (found != labels)
            if of_both.any() and (share := swapped.sum() / of_both.sum()) >= CONFUSED:
                yield Close(classes[first], classes[second], float(share))


def _copies(tokens: Float) -> Iterator[tuple[int, int]]:
    flat = tokens.reshape(len(tokens), -1)
    offsets = flat - flat.mean(axis=0)
    unit = offsets / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
    alike = np.triu(unit @ unit.T, k=1)
    for first, second in np.argwhere(alike >= ALIKE):
        yield int(first), int(second)
