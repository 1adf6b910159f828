"""What training tiles looked like: how far from them a tile may be and still get an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import BundleError
from cdt_runtime.tile_statistics import sharpness, statistics_count

Float = NDArray[np.float32]
REFERENCE = "reference.safetensors"


ROUNDING = 1e-3
"""Share by which the same tile's sharpness may differ from one machine to another."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The `tile_statistics` of the training tiles, by class.

    The distance of a tile is that of Mahalanobis, under the covariance within classes, to the
    nearest class, or to the nearest of the tiles that were enrolled on the device. A class's mean
    counts as known from its number of tiles, an enrolled tile as a mean of one.

    Attributes:
        means: `(K, F)` float32, of each class.
        counts: `(K,)` int64, tiles of each.
        whitener: `(F, F)` float32; statistics times it have unit covariance within classes.
        limit: `(1,)` float32, the distance beyond which a tile is unlike what is known.
        least_sharpness: `(1,)` float32, that of the least sharp training tile.
        density_mean: `(M,)` float32, mean optical density of the training tiles' channels.
        density_spread: `(M,)` float32, mean of its standard deviation within a tile.

    Source: Lee et al. 2018, on plain statistics in place of a network's features.
    """

    means: Float
    counts: NDArray[np.int64]
    whitener: Float
    limit: Float
    least_sharpness: Float
    density_mean: Float
    density_spread: Float

    def to_bytes(self) -> bytes:
        """Return the file that a bundle keeps."""
        from safetensors.numpy import save

        return save(
            {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        )

    @classmethod
    def from_bytes(cls, data: bytes, channels: int) -> Reference:
        """Read back what `to_bytes` gave.

        Args:
            data: content of `reference.safetensors`.
            channels: of the model's tiles.

        Raises:
            BundleError: it can't be read, or is of other tiles.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            made = cls(**load(data))
        except (SafetensorError, TypeError) as error:
            raise BundleError(f"{REFERENCE} can't be read ({error}): export again") from error
        size = statistics_count(channels)
        kinds = len(made.counts)
        expected: dict[str, tuple[int, ...]] = {
            "means": (kinds, size),
            "counts": (kinds,),
            "whitener": (size, size),
            "limit": (1,),
            "least_sharpness": (1,),
            "density_mean": (channels,),
            "density_spread": (channels,),
        }
        for name, shape in expected.items():
            array: NDArray[Any] = getattr(made, name)
            if array.shape != shape or not np.isfinite(array).all():
                raise BundleError(
                    f"{REFERENCE}: {name} of shape {array.shape}, expected finite {shape}: "
                    f"export again"
                )
        if made.limit[0] <= 0 or made.counts.min(initial=1) < 1:
            raise BundleError(f"{REFERENCE}: a limit or a count is not positive: export again")
        return made

    def distances(self, statistics: Float, enrolled: Float) -> Float:
        """Distance of tiles to what is known.

        Args:
            statistics: `(B, F)`.
            enrolled: `(E, F)`, of tiles enrolled on the device.

        Returns:
            `(B,)` float32.
        """
        known = np.concatenate([self.means, enrolled]) @ self.whitener
        counts = np.concatenate([self.counts, np.ones(len(enrolled), np.int64)])
        found = np.linalg.norm((statistics @ self.whitener)[:, None] - known, axis=2)
        result: Float = (found / np.sqrt(1 + 1 / counts)).min(axis=1).astype(np.float32)
        return result

    def unlikeness(self, statistics: Float, enrolled: Float) -> Float:
        """Distance of tiles as a share of the limit, `(B,)`: above 1 they are unlike."""
        result: Float = self.distances(statistics, enrolled) / self.limit
        return result

    def blurred(self, statistics: Float, channels: int) -> NDArray[np.bool_]:
        """Whether tiles are less sharp than any that training saw, `(B,)`; one of these is not."""
        least = self.least_sharpness - ROUNDING * np.abs(self.least_sharpness)
        result: NDArray[np.bool_] = sharpness(statistics, channels) < least
        return result


def stacked(statistics: Sequence[Float], channels: int) -> Float:
    """Put the statistics of tiles together, `(B, F)`, also of none."""
    empty = np.zeros((0, statistics_count(channels)), np.float32)
    result: Float = np.concatenate([empty, *(one[None] for one in statistics)])
    return result
