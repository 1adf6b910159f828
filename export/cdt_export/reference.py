"""Fit what the runtime holds tiles against before it answers: the training tiles' plain figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_export.inputs import TrainingData
from cdt_runtime.adaptation import densities
from cdt_runtime.reference import Reference, stacked
from cdt_runtime.tile_statistics import sharpness, tile_statistics

Float = NDArray[np.float32]

MAX_TILES = 4000
"""Training and validation tiles that are looked at, drawn at random from all of them."""
AT_ONCE = 256
"""Tiles in memory at a time."""
FOLDS = 10
"""Parts of the groups that are left out in turn, to see how far a tile of an unseen group lies."""
ACCEPTED = 0.96
"""Share of tiles of unseen groups that the limit lets pass."""
REFERENCE_TILES = 101
"""Purpose of the random numbers that choose them, as `cdt_train.split` has its own."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Figures of training and validation tiles.

    Attributes:
        statistics: `(n, F)`.
        labels: `(n,)` class indices.
        groups: `(n,)`; tiles of one patient or group share a number.
        densities: `(n, 2, M)`, mean and standard deviation of each channel's optical density.
    """

    statistics: Float
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    densities: Float

    def where(self, chosen: NDArray[np.bool_]) -> Seen:
        """Return the chosen tiles."""
        return Seen(
            self.statistics[chosen],
            self.labels[chosen],
            self.groups[chosen],
            self.densities[chosen],
        )


def seen_tiles(data: TrainingData) -> Seen:
    """Measure training and validation tiles.

    Raises:
        DatasetError: the data has changed.
    """
    trained, split = data.trained, data.trained.info["split"]
    names = sorted(split["train"] + split["val"])
    rng = np.random.default_rng([trained.recipe.training.seed, REFERENCE_TILES])
    chosen = [names[place] for place in rng.permutation(len(names))[:MAX_TILES]]
    numbers = {owner: number for number, owner in enumerate(sorted(set(data.owners(names))))}
    found: list[Float] = []
    labels: list[int] = []
    density: list[Float] = []
    for start in range(0, len(chosen), AT_ONCE):
        arrays = data.plain_tiles(chosen[start : start + AT_ONCE])
        found += [tile_statistics(tile) for tile in arrays.tiles.numpy()]
        density += [densities(tile) for tile in arrays.tiles.numpy()]
        labels += arrays.labels.tolist()
    return Seen(
        stacked(found, len(trained.preprocess.channels)),
        np.array(labels, np.int64),
        np.array([numbers[owner] for owner in data.owners(chosen)], np.int64),
        np.stack(density),
    )


def fit_reference(seen: Seen, channels: int) -> tuple[Reference, dict[str, Any]]:
    """Fit a reference, and the limit to tiles of groups that it was not fitted to.

    Args:
        seen: the tiles; there are at least two groups.
        channels: of a tile.

    Returns:
        The reference, and what the manifest says of it.
    """
    distances = np.concatenate([_of_unseen(rest, unseen) for rest, unseen in _folds(seen)])
    limit = _quantile(distances, ACCEPTED)
    reference = _fitted(seen, limit, channels)
    return reference, {
        "tiles": len(seen.labels),
        "groups": len(np.unique(seen.groups)),
        "accepted": ACCEPTED,
        "limit": limit,
    }


def _folds(seen: Seen) -> Iterator[tuple[Seen, Seen]]:
    """Leave groups out in turn; what is left holds every class that it is asked about."""
    groups = np.unique(seen.groups)
    part = np.random.default_rng(0).permutation(len(groups)) % min(FOLDS, len(groups))
    part_of = dict(zip(groups.tolist(), part.tolist(), strict=True))
    parts = np.array([part_of[group] for group in seen.groups.tolist()])
    for number in np.unique(parts):
        rest = seen.where(parts != number)
        unseen = seen.where(parts == number)
        yield rest, unseen.where(np.isin(unseen.labels, rest.labels))


def _of_unseen(rest: Seen, unseen: Seen) -> Float:
    none = unseen.statistics[:0]
    return _fitted(rest, 1.0, 0).distances(unseen.statistics, none)


def _fitted(seen: Seen, limit: float, channels: int) -> Reference:
    """Class means, and the covariance within classes, drawn towards equal variances.

    Source: Ledoit and Wolf 2004 for how far it is drawn.
    """
    from sklearn.covariance import LedoitWolf

    kinds, place = np.unique(seen.labels, return_inverse=True)
    statistics = seen.statistics.astype(np.float64)
    means = np.stack([statistics[place == k].mean(axis=0) for k in range(len(kinds))])
    offsets = statistics - means[place]
    spread = offsets.std(axis=0) + 1e-6
    covariance = LedoitWolf(assume_centered=True).fit(offsets / spread).covariance_
    values, vectors = np.linalg.eigh(covariance)
    whitener = (vectors / np.sqrt(np.maximum(values, 1e-9))) / spread[:, None]
    least = sharpness(seen.statistics, channels).min() if channels else 0.0
    return Reference(
        means=means.astype(np.float32),
        counts=np.bincount(place).astype(np.int64),
        whitener=whitener.astype(np.float32),
        limit=np.array([limit], np.float32),
        least_sharpness=np.array([least], np.float32),
        density_mean=seen.densities[:, 0].mean(axis=0),
        density_spread=seen.densities[:, 1].mean(axis=0),
    )


def _quantile(distances: Float, share: float) -> float:
    """The least distance that at least this share of new tiles is within, were they like these."""
    ordered = np.sort(distances)
    place = int(np.ceil((len(ordered) + 1) * share)) - 1
    return float(ordered[min(place, len(ordered) - 1)])
