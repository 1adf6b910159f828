"""The limits of a tile, checked before anything is decoded."""

from __future__ import annotations

from cdt_runtime.errors import TileError

MAX_PIXELS = 64 * 2**20
"""Pixels (height x width) of one tile; anything larger is a slide."""

MAX_BYTES = 2**30
"""Decoded bytes of one tile, all channels together."""


def check_filled(height: int, width: int) -> None:
    """Refuse an image without pixels."""
    if height < 1 or width < 1:
        raise TileError(f"is {width} x {height} pixels: there is no image in it")


def check_pixels(height: int, width: int) -> None:
    """Refuse an image that is empty or over the pixel limit."""
    check_filled(height, width)
    if height * width > MAX_PIXELS:
        raise TileError(
            f"is {width} x {height} pixels, over the limit of {MAX_PIXELS // 2**20} Mpixel a tile: "
            "use --slide, or crop a tile"
        )


def check_bytes(count: int) -> None:
    """Refuse an image whose decoded pixels would not fit."""
    if count > MAX_BYTES:
        raise TileError(
            f"decodes to {count / 2**20:.0f} MiB, over the limit of {MAX_BYTES // 2**20} MiB a "
            "tile: crop a tile, or keep fewer channels"
        )
