"""What the bridge gets of a foundation encoder: a few tokens an image, always of one shape.

Training extracts them once and keeps them, the runtime computes them for each tile; both by this
module. An encoder that gives tokens is reduced to the means of the four quarters of its image, with
the embedding as a fifth where it is as wide. Zeros stand for an encoder that said nothing: the
bridge masks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.encoder_card import EncoderCard

Float = NDArray[np.float32]
Layout = Mapping[str, tuple[int, int]]
"""By encoder the number of its tokens and their width `(X, W)`."""

VERSION = 1
"""Raised when the same encoder and image give other tokens than before: kept ones are stale."""

SIDE = 2
"""Parts that an image is divided into, along each side."""


def feature_shape(card: EncoderCard) -> tuple[int, int]:
    """Return the number of tokens an image and their width, `(X, W)`."""
    if card.token_dim is None:
        return 1, card.embedding_dim
    return SIDE**2 + (card.token_dim == card.embedding_dim), card.token_dim


def feature_tokens(card: EncoderCard, embedding: Float, tokens: Float | None) -> Float:
    """Reduce what an encoder says of images.

    Args:
        card: of the encoder.
        embedding: `(B, D)`.
        tokens: `(B, N, Dt)` in rows from the top left, or None where it gives none.

    Returns:
        `(B, X, W)` float32, `feature_shape` each.
    """
    if card.token_dim is None or tokens is None:
        return np.ascontiguousarray(embedding[:, None], dtype=np.float32)
    means = np.stack([part.mean(axis=1) for part in _parts(tokens)], axis=1)
    if card.token_dim == card.embedding_dim:
        means = np.concatenate([embedding[:, None], means], axis=1)
    return np.ascontiguousarray(means, dtype=np.float32)


def feature_layout(cards: Iterable[EncoderCard], modality: str) -> Layout:
    """Return the shape of what each encoder says of a tile, or of a CT, in their order."""
    return {card.key: feature_shape(card) for card in cards if card.modality == modality}


def flat_features(layout: Layout, features: Mapping[str, Float], count: int) -> Float:
    """Lay the features of all encoders side by side, as the graphs take them.

    Args:
        layout: of the encoders.
        features: by encoder `(B, X, W)`; zeros stand for one that is not there.
        count: B.

    Returns:
        `(B, F)` float32.
    """
    parts = [
        features[key].reshape(count, -1) if key in features else np.zeros((count, tokens * width))
        for key, (tokens, width) in layout.items()
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def over_slices(features: Float) -> Float:
    """Join the features of a volume's slices, `(n, X, W)`, to those of the volume, `(X, W)`."""
    return np.ascontiguousarray(features.mean(axis=0), dtype=np.float32)


def _parts(tokens: Float) -> list[Float]:
    """Divide tokens by the quarter of the image that they show, or in order."""
    batch, count, width = tokens.shape
    side = isqrt(count)
    if side * side != count or side < SIDE:
        return np.array_split(tokens, min(SIDE**2, count), axis=1)
    grid = tokens.reshape(batch, side, side, width)
    return [
        part.reshape(batch, -1, width)
        for rows in np.array_split(grid, SIDE, axis=1)
        for part in np.array_split(rows, SIDE, axis=2)
    ]
