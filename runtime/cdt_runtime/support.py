"""Support sets changed: tiles added to a class, a class taken out. Plain values in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import PrototypeError
from cdt_runtime.printable import printable
from cdt_runtime.prototypes import Prototypes

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class NewTiles:
    """Support tiles that are to be added.

    Attributes:
        names: of each, for messages.
        labels: class of each.
        sha256: hash of each one's file or array.
        tokens: `(S, N, C)` float32, as the path encoder gives them.
        statistics: `(S, F)` float32, `tile_statistics` of each.
        ct_tokens: `(T, C)` float32 of the CT that they share, or None.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    sha256: tuple[str, ...]
    tokens: Float
    statistics: Float
    ct_tokens: Float | None = None


def class_name(name: str) -> str:
    """Return the name of a class as it is kept.

    Raises:
        PrototypeError: it is empty, long, or holds what a terminal or a table can't show.
    """
    kept = " ".join(name.split())
    if not 0 < len(kept) <= 80 or kept != printable(kept):
        raise PrototypeError(
            f"class {name!r}: expected a name of 1 to 80 letters that can be shown"
        )
    return kept


def added(support: Prototypes, new: NewTiles) -> Prototypes:
    """Add tiles to their classes; classes that are new come last, in the order of their tiles.

    The scale becomes that which training calibrated for as many tiles as the smallest class has.

    Raises:
        PrototypeError: a tile is in the support set already, or twice among the new ones.
    """
    known = {sha: support.classes[label] for sha, label in _hashed(support)}
    for name, label, sha in zip(new.names, new.labels, new.sha256, strict=True):
        if sha in known:
            raise PrototypeError(
                f"{name}: is a support tile of class {known[sha]!r} already: leave it out of "
                f"{label!r}"
            )
        known[sha] = label
    classes = tuple(dict.fromkeys([*support.classes, *map(class_name, new.labels)]))
    labels = [classes.index(class_name(label)) for label in new.labels]
    grown = replace(
        support,
        classes=classes,
        labels=np.concatenate([support.labels, np.array(labels, np.int64)]),
        tokens=np.concatenate([support.tokens, new.tokens]),
        support_sha256=(*support.support_sha256, *new.sha256),
        **_with_ct(support, new),
        **_with_statistics(support, new),
        held_out=(),
    )
    return _rescaled(grown)


def without_class(support: Prototypes, name: str) -> Prototypes:
    """Take a class out.

    Raises:
        PrototypeError: there is none of that name, or fewer than two would be left.
    """
    kept = class_name(name)
    if kept not in support.classes:
        raise PrototypeError(
            f"class {name!r}: unknown: the classes are {', '.join(support.classes)}"
        )
    if len(support.classes) < 3:
        raise PrototypeError(
            f"class {name!r}: without it {len(support.classes) - 1} would be left, expected at "
            f"least 2: add another first"
        )
    stay = support.labels != support.classes.index(kept)
    classes = tuple(one for one in support.classes if one != kept)
    return _rescaled(
        replace(
            _only(support, stay),
            classes=classes,
            labels=np.array(
                [classes.index(support.classes[one]) for one in support.labels[stay]], np.int64
            ),
        )
    )


def _only(support: Prototypes, stay: NDArray[np.bool_]) -> Prototypes:
    hashes = zip(support.support_sha256, stay, strict=True)
    return replace(
        support,
        labels=support.labels[stay],
        tokens=support.tokens[stay],
        support_sha256=tuple(sha for sha, kept in hashes if kept),
        ct_of=None if support.ct_of is None else support.ct_of[stay],
        **_statistics_of(support, stay),
        held_out=(),
    )


def _statistics_of(support: Prototypes, stay: NDArray[np.bool_]) -> dict[str, Any]:
    if support.statistics is None or support.statistics_of is None:
        return {}
    kept = stay[support.statistics_of]
    if not kept.any():
        return {"statistics": None, "statistics_of": None}
    places = np.cumsum(stay) - 1
    return {
        "statistics": support.statistics[kept],
        "statistics_of": places[support.statistics_of[kept]].astype(np.int64),
    }


def _hashed(support: Prototypes) -> Sequence[tuple[str, int]]:
    return list(zip(support.support_sha256, support.labels.tolist(), strict=True))


def _with_ct(support: Prototypes, new: NewTiles) -> dict[str, Any]:
    """Give new tiles their own patient's CT where support tiles have that."""
    if support.ct_tokens is None or support.ct_of is None:
        return {}
    own = -1 if new.ct_tokens is None else len(support.ct_tokens)
    tokens = (
        [support.ct_tokens] if new.ct_tokens is None else [support.ct_tokens, new.ct_tokens[None]]
    )
    return {
        "ct_tokens": np.concatenate(tokens),
        "ct_of": np.concatenate([support.ct_of, np.full(len(new.labels), own, np.int64)]),
    }


def _with_statistics(support: Prototypes, new: NewTiles) -> dict[str, Any]:
    """Let what is like the new tiles be known, too."""
    start = len(support.labels)
    places = np.arange(start, start + len(new.labels), dtype=np.int64)
    if support.statistics is None or support.statistics_of is None:
        return {"statistics": new.statistics, "statistics_of": places}
    return {
        "statistics": np.concatenate([support.statistics, new.statistics]),
        "statistics_of": np.concatenate([support.statistics_of, places]),
    }


def _rescaled(support: Prototypes) -> Prototypes:
    """Take the scales that training calibrated for the number of tiles of the smallest class."""
    facts = support.calibration
    least = int(np.bincount(support.labels, minlength=len(support.classes)).min())
    scales: dict[str, Any] = {
        field: calibrated_scale(facts, name, least)
        for field, name in (("scale", "temperatures"), ("scale_with_ct", "temperatures_with_ct"))
        if facts.get(name)
    }
    return replace(support, **scales)


def calibrated_scale(calibration: Mapping[str, Any], name: str, tiles: int) -> float:
    """The scale that training calibrated for so many tiles a class, or the next fewer it tried.

    Args:
        calibration: of the prototypes.
        name: "temperatures" or "temperatures_with_ct".
        tiles: of the smallest class.
    """
    known = {int(k): float(value) for k, value in calibration[name].items()}
    below = [k for k in known if k <= tiles]
    return float(calibration["learnt_scale"]) / known[max(below) if below else min(known)]
