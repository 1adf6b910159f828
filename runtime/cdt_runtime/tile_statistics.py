"""Plain figures of a tile's colour and texture, by which foreign input is told from what is known.

What a trained encoder says will not do for that: it maps whatever it is shown into the classes that
it knows. These figures were not learnt, so training tiles and new tiles are alike to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

SCALES = 3
"""Sizes of detail that are told apart: of 1, 2 and 4 pixels of the tile input."""

FLOOR = 0.002
"""Added to a mean difference of neighbours, a share of full scale: half a step of 8 bits."""

LEAST_SPREAD = 0.01
"""Added to a standard deviation, a share of full scale."""


def tile_statistics(tile: NDArray[Any]) -> Float:
    """Measure a tile input.

    Args:
        tile: `(M, S, S)`, uint8 or float32 in 0 to 1.

    Returns:
        `(F,)` float32: of each channel the mean, the logarithm of the standard deviation, the
        skewness, and the logarithm of the mean difference of neighbours at each of `SCALES`; then
        the correlation of each pair of channels.
    """
    channels = len(tile)
    detail = tile.astype(np.float32)
    if tile.dtype == np.uint8:
        detail *= np.float32(1 / 255)
    flat = detail.reshape(channels, -1)
    means = flat.mean(axis=1)
    offsets = flat - means[:, None]
    covariance = offsets @ offsets.T / flat.shape[1]
    spread = np.sqrt(np.diag(covariance)) + LEAST_SPREAD
    offsets /= spread[:, None]
    skewness = np.einsum("ms,ms,ms->m", offsets, offsets, offsets) / flat.shape[1]
    found = [means, np.log(spread), skewness]
    for _ in range(SCALES):
        found.append(np.log(_roughness(detail) + FLOOR))
        detail = _halved(detail)
    first, second = np.triu_indices(channels, k=1)
    found.append((covariance / np.outer(spread, spread))[first, second])
    result: Float = np.concatenate(found).astype(np.float32)
    return result


def statistics_count(channels: int) -> int:
    """F, for tiles of so many channels."""
    return channels * (3 + SCALES) + channels * (channels - 1) // 2


def sharpness(statistics: Float, channels: int) -> Float:
    """How much stronger the finest detail is than the coarsest, `(...,)`, a logarithm.

    Args:
        statistics: `(..., F)`.
        channels: M.
    """
    first, last = 3 * channels, (3 + SCALES - 1) * channels
    fine = statistics[..., first : first + channels]
    coarse = statistics[..., last : last + channels]
    result: Float = (fine - coarse).mean(axis=-1)
    return result


def _roughness(detail: Float) -> Float:
    """Mean difference of neighbours of each channel."""
    across = detail[:, :, 1:] - detail[:, :, :-1]
    down = detail[:, 1:] - detail[:, :-1]
    result: Float = np.abs(across, out=across).mean(axis=(1, 2))
    result += np.abs(down, out=down).mean(axis=(1, 2))
    return result


def _halved(detail: Float) -> Float:
    """Means of 2 x 2 pixels."""
    rows, columns = (size // 2 * 2 for size in detail.shape[1:])
    even = detail[:, :rows, :columns]
    result: Float = np.float32(0.25) * (
        even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]
    )
    return result
