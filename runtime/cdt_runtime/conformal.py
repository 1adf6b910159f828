"""Sets of classes that hold the right one as often as was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.prototypes import Prototypes
from cdt_runtime.review import left_out

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Certificate:
    """How improbable a class may be and still belong to the set.

    Attributes:
        level: share of tiles whose set is to hold their class.
        tiles: how many, unseen by training, it rests on.
        least: probability from which on a class is in the set; None where so few tiles can't
            certify the level.
    """

    level: float
    tiles: int
    least: float | None

    @property
    def needed(self) -> int:
        """How many tiles the level takes at the least."""
        return math.ceil(round(self.level / (1 - self.level), 9))

    @property
    def note(self) -> str | None:
        """Why there are no sets, in one line; None where there are."""
        if self.least is not None:
            return None
        return (
            f"no sets at {100 * self.level:g} %: they take {self.needed} or more tiles that "
            f"training did not see, some of every class, and there are {self.tiles}: enrol more, "
            "or ask for less"
        )

    def classes(self, chances: Mapping[str, float]) -> tuple[str, ...] | None:
        """The classes of the set, the likeliest first; there may be none."""
        if self.least is None:
            return None
        likely = sorted(chances, key=lambda name: -chances[name])
        return tuple(name for name in likely if chances[name] >= self.least)


def certify(chances: NDArray[np.float64], level: float) -> Certificate:
    """Find the probability that as many known tiles give their class as is asked for.

    Between two tiles it is interpolated: the next tile's would leave classes in more often than
    asked. It holds for tiles that come as these did.

    Args:
        chances: `(n,)`, what each of these tiles gave its own class; training saw none of them.
        level: above 0, below 1.

    Source: Vovk et al. 2005 and Sadinle et al. 2019.
    """
    scores = np.sort(1.0 - chances)
    count = len(scores)
    place = (count + 1) * level
    if count == 0 or place > count + 1e-9:
        return Certificate(level, count, None)
    found = float(np.interp(place, np.arange(1, count + 1), scores))
    return Certificate(level, count, 1.0 - found)


def own_chances(support: Prototypes, embedded: Float, with_ct: bool) -> NDArray[np.float64]:
    """What tiles that training did not see give their own class, `(n,)`.

    Those of the test fold, as long as the support is the one that was exported; then the enrolled
    ones, each left out in turn, if there are some of every class that can be. The encoder knows the
    others by heart: they would promise too much.

    Args:
        support: the support set.
        embedded: `(S, E)`, its unit vectors in the context.
        with_ct: whether that is a CT.

    Source: leaving out, Barber et al. 2021.
    """
    if support.held_out and not with_ct:
        return np.array(support.held_out)
    kinds = len(support.classes)
    scale = support.scale_with_ct if with_ct else support.scale
    chances = left_out(embedded, support.labels, kinds, support.fit, scale)
    enrolled = np.zeros(len(support.labels), bool)
    if support.statistics_of is not None:
        enrolled[support.statistics_of] = True
    enrolled &= ~np.isnan(chances[:, 0])
    if len(np.unique(support.labels[enrolled])) < kinds:
        return np.zeros(0)
    return chances[enrolled, support.labels[enrolled]]
