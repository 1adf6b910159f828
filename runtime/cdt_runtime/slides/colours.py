"""One colour a class, the same in every file."""

from __future__ import annotations

import colorsys

Rgb = tuple[int, int, int]

_FIRST: tuple[Rgb, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (230, 159, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
)
"""Told apart with any colour vision.

Source: Okabe and Ito 2008.
"""

_GOLDEN = 0.618034


def class_colours(count: int) -> tuple[Rgb, ...]:
    """Return `count` colours; beyond the first seven, hues far from their neighbours."""
    more = [_hue(place * _GOLDEN % 1.0) for place in range(max(0, count - len(_FIRST)))]
    return (*_FIRST[:count], *more)


def _hue(hue: float) -> Rgb:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.8))
    return red, green, blue
