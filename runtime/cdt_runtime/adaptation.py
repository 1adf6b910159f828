"""A site's stain brought to that of training: one gain and one offset a channel.

In optical density, where a stronger or weaker stain, and a brighter or darker lamp, are just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import PrototypeError

Float = NDArray[np.float32]

DARKEST = 1 / 255
"""Least light that a density is taken of, as a share of full scale."""


def densities(tile: NDArray[Any]) -> Float:
    """Mean and standard deviation of each channel's optical density, `(2, M)`.

    Args:
        tile: `(M, S, S)`, uint8 or float32 in 0 to 1.
    """
    found = _density(tile).reshape(len(tile), -1)
    return np.stack([found.mean(axis=1), found.std(axis=1)]).astype(np.float32)


@dataclass(frozen=True)
class Adaptation:
    """What is done to every tile before the model sees it.

    Attributes:
        gain: factor of each channel's optical density.
        offset: added to it then.
        tiles: of the site, that it was fitted to.

    Source: Reinhard et al. 2001, in optical density.
    """

    gain: tuple[float, ...]
    offset: tuple[float, ...]
    tiles: int

    def __call__(self, tile: NDArray[Any]) -> NDArray[Any]:
        """Change a tile input `(M, S, S)`; its type stays."""
        gain, offset = (np.array(one, np.float32) for one in (self.gain, self.offset))
        if tile.dtype == np.uint8:
            levels = np.arange(256, dtype=np.uint8)
            light = np.exp(-(_density(levels)[None] * gain[:, None] + offset[:, None]))
            table = np.rint(np.clip(255 * light, 0, 255)).astype(np.uint8)
            return np.stack([row[plane] for row, plane in zip(table, tile, strict=True)])
        changed = np.exp(-(_density(tile) * gain[:, None, None] + offset[:, None, None]))
        result: Float = np.clip(changed, 0.0, 1.0).astype(np.float32)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values, as JSON holds them."""
        return {"gain": list(self.gain), "offset": list(self.offset), "tiles": self.tiles}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Adaptation:
        """Read back what `to_dict` gave.

        Raises:
            PrototypeError: a value is out of range.
        """
        gain, offset = (tuple(map(float, values[name])) for name in ("gain", "offset"))
        sound = all(0.1 < one < 10 for one in gain) and all(abs(one) < 6 for one in offset)
        if not sound or len(gain) != len(offset):
            raise PrototypeError("prototypes: the adaptation to a site is out of range: undo it")
        return cls(gain, offset, int(values["tiles"]))


def fit_adaptation(site: Float, density_mean: Float, density_spread: Float) -> Adaptation:
    """Bring a site's densities to those of training.

    Args:
        site: `(n, 2, M)`, `densities` of its tiles.
        density_mean: `(M,)`, mean of the first over the training tiles.
        density_spread: `(M,)`, of the second.
    """
    mean, spread = site.mean(axis=0)
    gain = np.clip(density_spread / np.maximum(spread, 1e-3), 0.2, 5.0)
    offset = np.clip(density_mean - gain * mean, -5.0, 5.0)
    return Adaptation(tuple(map(float, gain)), tuple(map(float, offset)), len(site))


def _density(tile: NDArray[Any]) -> Float:
    light = tile.astype(np.float32)
    if tile.dtype == np.uint8:
        light *= np.float32(1 / 255)
    result: Float = -np.log(np.maximum(light, np.float32(DARKEST)))
    return result
