"""What goes into a classification and what comes out of it: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True)
class CtUsed:
    """The CT context of a prediction.

    Attributes:
        series: size and spacing; never text or identifiers of the headers.
        cache_hit: whether its tokens came from the cache.
        warnings: what the reader had to mend or leave out.
        off: why the answer does not rest on it, in one line; None where it does.
    """

    series: str
    cache_hit: bool
    warnings: tuple[str, ...] = ()
    off: str | None = None


@dataclass(frozen=True)
class CtChange:
    """What a CT would have changed, where the answer does not rest on it.

    Attributes:
        label: the class with the CT, or None where it would abstain.
        nearest: the class with the nearest prototype.
        shift: probability of each class with the CT, less that without.
    """

    label: str | None
    nearest: str
    shift: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one tile.

    Attributes:
        tile: the tile's name.
        sha256: of its file, files or array.
        label: the class, or None where it abstains.
        probabilities: calibrated probability of each class.
        distances: Euclidean distance to each prototype on the unit sphere, 0 to 2.
        abstained: whether it declines to answer.
        reason: why it abstains.
        ct: the CT context, or None; `ct.off` says whether the answer rests on it.
        ct_change: what the CT would have changed; None where the answer rests on it, or there is
            none.
        channels: for each model channel the file's channel, None where it was filled with zeros.
        warnings: what the user should know of this tile.
        unlikeness: how far its colour and texture are from what is known, as a share of the
            limit; above 1 it is refused.
        prediction_set: classes that hold the right one as often as was asked for, the likeliest
            first; None where that was not asked for, can't be certified, or the tile shows nothing
            that the model knows.
        timings_ms: milliseconds of each stage; the engine's time is shared by its batch.
    """

    tile: str
    sha256: str
    label: str | None
    probabilities: dict[str, float]
    distances: dict[str, float]
    abstained: bool
    reason: str | None
    ct: CtUsed | None
    ct_change: CtChange | None
    channels: dict[str, str | None]
    warnings: tuple[str, ...]
    unlikeness: float
    prediction_set: tuple[str, ...] | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def nearest(self) -> str:
        """The class with the nearest prototype, also where the answer is an abstention."""
        return nearest(self.distances)


def nearest(distances: Mapping[str, float]) -> str:
    """Return the class with the least distance."""
    return min(distances, key=lambda name: distances[name])


@dataclass(frozen=True, eq=False)
class Context:
    """CT tokens as the bridge takes them.

    Attributes:
        tokens: `(1, T, C)` float32; zeros where there is no CT.
        present: `(1,)` float32, 1 with a CT and 0 without.
        key: identity of the tokens, for the prototypes of this context.
        used: what a prediction reports, or None.
        timings_ms: milliseconds of reading and encoding.
    """

    tokens: Float
    present: Float
    key: str
    used: CtUsed | None
    timings_ms: dict[str, float]


@dataclass(frozen=True, eq=False)
class TileInput:
    """A tile, ready for the graph, with what there is to say about it.

    Attributes:
        array: `(M, S, S)`.
        name: what results call it.
        sha256: of its file, files or array.
        blank: whether it shows no tissue.
        channels: for each model channel the file's, None where it was filled with zeros.
        warnings: one line each.
        read_ms: milliseconds that it took.
        statistics: `(F,)`, its `tile_statistics`.
        images: the tile as each foundation encoder takes it, by encoder.
    """

    array: NDArray[Any]
    name: str
    sha256: str
    blank: bool
    channels: dict[str, str | None]
    warnings: tuple[str, ...]
    read_ms: float
    statistics: Float
    images: Mapping[str, Float] = field(default_factory=dict)
