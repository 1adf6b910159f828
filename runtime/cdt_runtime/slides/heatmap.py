"""Probabilities as a pyramidal OME-TIFF: one pixel a tile, one channel a class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

LEAST_SIDE = 64
"""A level with a longer side no longer than this has none below it."""


def write_heatmap(path: Path, chances: Float, classes: Sequence[str], microns: float) -> None:
    """Write the map.

    Args:
        path: of the file, which should end in `.ome.tif`.
        chances: `(K, rows, columns)` float32, NaN where there is no tissue or no answer.
        classes: K names.
        microns: along a tile, which is along a pixel.

    Raises:
        ModuleNotFoundError: tifffile is not installed.
    """
    from tifffile import TiffWriter

    levels = [chances]
    while max(levels[-1].shape[1:]) > LEAST_SIDE:
        levels.append(halved(levels[-1]))
    storing: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": "zlib",
        "tile": (256, 256),
    }
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": list(classes)},
        "PhysicalSizeX": microns,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": microns,
        "PhysicalSizeYUnit": "µm",
    }
    with TiffWriter(path, ome=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **storing)
        for level in levels[1:]:
            file.write(level, subfiletype=1, metadata=None, **storing)


def halved(chances: Float) -> Float:
    """Average 2 x 2 pixels, over those that have data; at an odd edge over fewer."""
    count, rows, columns = chances.shape
    padded = np.pad(
        chances, ((0, 0), (0, rows % 2), (0, columns % 2)), constant_values=np.float32(np.nan)
    )
    blocks = padded.reshape(count, (rows + 1) // 2, 2, (columns + 1) // 2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        result: Float = np.nanmean(blocks, axis=(2, 4)).astype(np.float32)
    return result
