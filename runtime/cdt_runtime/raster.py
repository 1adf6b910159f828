"""What every file reader hands over, and the small steps that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdt_runtime.errors import TileError

MAX_MPP = 20.0
"""Coarser is a printer's or screen's resolution (72, 96 or 300 dpi), not a microscope's."""


@dataclass(frozen=True, eq=False)
class Raster:
    """One decoded image before it has a name and a hash.

    Args:
        pixels: `(H, W, C)`.
        names: C channel names; None where the file has none.
        bits: significant bits of an integer sample, 32 for float.
        mpp: microns a pixel, or None.
        warnings: what the user should know.
        renamable: whether `--channels` may name the samples: true of samples stored one by one,
            false of colours that a codec mixes.
    """

    pixels: np.ndarray
    names: tuple[str, ...] | None
    bits: int
    mpp: float | None
    warnings: tuple[str, ...] = ()
    renamable: bool = False


def drop_alpha(pixels: np.ndarray, bits: int) -> np.ndarray:
    """The samples `(H, W, C)` without the last, which must be opaque everywhere.

    Raises:
        TileError: A pixel is transparent: its colour is not defined.
    """
    opaque = 1.0 if pixels.dtype.kind == "f" else 2**bits - 1
    if not (pixels[:, :, -1] == opaque).all():
        raise TileError(
            "has a fourth or second channel that is not an opaque alpha: flatten the image, or "
            "name every channel with --channels"
        )
    return np.ascontiguousarray(pixels[:, :, :-1])


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image upright, by the TIFF and EXIF tag Orientation (1 to 8).

    Source: TIFF 6.0, section 8, Orientation.
    """
    if orientation not in range(1, 9):
        raise TileError(f"has Orientation {orientation}, expected 1 to 8: damaged; save it again")
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)  # (W, H, C)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def plausible_mpp(
    across: float, down: float, coarsest: float = MAX_MPP
) -> tuple[float | None, tuple[str, ...]]:
    """Microns a pixel, or None where the file's figure can't be a microscope's; and warnings."""
    if abs(across - down) > 0.01 * max(across, down):
        note = f"pixels of {across:.4g} x {down:.4g} microns are not square: give --mpp"
        return None, (note,)
    if not 0.01 <= across <= coarsest:
        return None, ()
    return across, ()
