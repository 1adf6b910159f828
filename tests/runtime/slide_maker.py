"""Slides for tests: written by tifffile, whose pixels are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[Any]


def smooth_rgb(height: int, width: int, seed: int = 0) -> Pixels:
    """An image `(height, width, 3)` that JPEG keeps well."""
    down, across = np.mgrid[:height, :width] / 40.0
    phase = np.random.default_rng(seed).random(3) * 6
    waves = [np.sin(down + one) + np.cos(across * (1 + one / 9)) for one in phase]
    return np.rint(127 + 50 * np.stack(waves, axis=2)).astype(np.uint8)


def write_ome(
    path: Path,
    pixels: Pixels,
    names: Sequence[str],
    mpp: float | None,
    *,
    levels: int = 3,
    tile: int = 64,
    compression: str = "zlib",
) -> Path:
    """An OME-TIFF with one page a channel and its levels in directories below each page.

    Args:
        path: of the file.
        pixels: `(H, W, C)`.
        names: of the channels.
        mpp: microns a pixel; None writes none.
        levels: each half the size of the one above.
        tile: pixels along a segment.
        compression: a name that tifffile knows.
    """
    planes = pixels.transpose(2, 0, 1)
    metadata: dict[str, Any] = {"axes": "CYX", "Channel": {"Name": list(names)}}
    if mpp is not None:
        metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
    storing: dict[str, Any] = {
        "tile": (tile, tile),
        "compression": compression,
        "photometric": "minisblack",
    }
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(planes, subifds=levels - 1, metadata=metadata, **storing)
        for step in range(1, levels):
            small = planes[:, :: 2**step, :: 2**step]
            file.write(small, subfiletype=1, metadata=None, **storing)
    return path


def write_svs(path: Path, pixels: Pixels, mpp: float, *, levels: int = 3) -> Path:
    """An SVS: tiled JPEG pages, each a fourth as wide as the last, and a thumbnail in strips."""
    first = f"Aperio Image Library\n{pixels.shape[1]}x{pixels.shape[0]}|AppMag = 20|MPP = {mpp}"
    storing: dict[str, Any] = {
        "photometric": "rgb",
        "metadata": None,
        "compression": "jpeg",
        "compressionargs": {"level": 95},
        "software": False,
    }
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), description=first, **storing)
        file.write(pixels[::8, ::8], rowsperstrip=16, description="thumbnail", **storing)
        for step in range(1, levels):
            level = np.ascontiguousarray(pixels[:: 4**step, :: 4**step])
            file.write(level, tile=(64, 64), description="level", **storing)
    return path
