"""A region of a slide's level."""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """A region of a level, in its pixels."""

    top: int
    left: int
    height: int
    width: int
