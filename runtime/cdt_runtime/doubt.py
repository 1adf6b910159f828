"""Whether a tile is one that the model can be asked about: like those that it knows, and sharp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.prototypes import Prototypes
from cdt_runtime.reference import Reference, stacked

Float = NDArray[np.float32]
UNLIKE, BLURRED = "unlike training", "blurred"
"""Why there is no answer, in a word or two."""


@dataclass(frozen=True)
class Look:
    """How a tile looks beside those that are known.

    Attributes:
        unlikeness: distance of its colour and texture to what is known, as a share of the limit.
        blurred: whether it is less sharp than every training tile.
    """

    unlikeness: float
    blurred: bool

    @property
    def unlike(self) -> bool:
        """Whether it is further away than what is accepted."""
        return not self.unlikeness <= 1.0

    @property
    def word(self) -> str | None:
        """Why it gets no answer, in a word or two; None where it may."""
        return UNLIKE if self.unlike else BLURRED if self.blurred else None

    @property
    def reason(self) -> str | None:
        """The same in a line."""
        if self.unlike:
            also = ", and less sharp than all of them" if self.blurred else ""
            return (
                f"unlike the training tiles: colour and texture lie {self.unlikeness:.1f} times as "
                f"far from them as is accepted{also}"
            )
        return "blurred: less sharp than every training tile" if self.blurred else None


def looks(
    reference: Reference, support: Prototypes, statistics: Sequence[Float], channels: int
) -> list[Look]:
    """Hold tiles against the training tiles and those that were enrolled on the device.

    Args:
        reference: of the bundle.
        support: of the bundle, as it is now.
        statistics: `(F,)` of each tile.
        channels: of a tile.
    """
    found = stacked(statistics, channels)
    enrolled = found[:0] if support.statistics is None else support.statistics
    unlike = reference.unlikeness(found, enrolled)
    blurred = reference.blurred(found, channels)
    return [Look(float(one), bool(two)) for one, two in zip(unlike, blurred, strict=True)]
