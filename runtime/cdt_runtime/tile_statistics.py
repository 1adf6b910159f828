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
        the correlation of each pair of channels. Of every second pixel: on the way of each tile
        this must cost next to nothing.
    """
    channels = len(tile)
    detail = tile.astype(np.int16) if tile.dtype == np.uint8 else np.float32(255) * tile
    flat = detail[:, ::2, ::2].reshape(channels, -1).astype(np.float32)
    flat *= np.float32(1 / 255)
    means = flat.mean(axis=1)
    flat -= means[:, None]
    covariance = flat @ flat.T / flat.shape[1]
    spread = np.sqrt(np.diag(covariance)) + LEAST_SPREAD
    cubes = (flat * flat * flat).mean(axis=1)
    found = [means, np.log(spread), cubes / spread**3]
    for scale in range(SCALES):
        found.append(np.log(_roughness(detail) / (255 * 4**scale) + FLOOR))
        if scale + 1 < SCALES:
            detail = _summed(detail)
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


def _roughness(detail: NDArray[Any]) -> NDArray[np.float64]:
    """Mean difference of neighbours of each channel, on every second row and column."""
    across = np.abs(detail[:, ::2, 1:] - detail[:, ::2, :-1])
    down = np.abs(detail[:, 1:, ::2] - detail[:, :-1, ::2])
    result: NDArray[np.float64] = across.mean(axis=(1, 2), dtype=np.float64) + down.mean(
        axis=(1, 2), dtype=np.float64
    )
    return result


def _summed(detail: NDArray[Any]) -> NDArray[Any]:
    """Sums of 2 x 2 pixels: 16 of 8 bits still fit."""
    rows, columns = (size // 2 * 2 for size in detail.shape[1:])
    pairs = detail[:, 0:rows:2, :columns] + detail[:, 1:rows:2, :columns]
    summed: NDArray[Any] = pairs[:, :, ::2] + pairs[:, :, 1::2]
    return summed
