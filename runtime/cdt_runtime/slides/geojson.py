"""Areas of a class as GeoJSON annotations that QuPath opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.files import write_synced
from cdt_runtime.slides.colours import class_colours
from cdt_runtime.slides.outlines import Area, Ring, areas

Float = NDArray[np.float32]
OPEN = (128, 128, 128)
"""Colour of areas without an answer."""


def write_geojson(
    path: Path,
    labels: NDArray[np.int16],
    chances: Float,
    classes: Sequence[str],
    reasons: tuple[NDArray[np.int16], Sequence[str]],
    *,
    side: float,
    microns: float,
) -> int:
    """Write one annotation an area of neighbouring tiles of a class, or without an answer.

    Args:
        path: of the file.
        labels: `(rows, columns)` index of the class, -1 without an answer.
        chances: `(K, rows, columns)` probabilities, NaN without an answer.
        classes: K names.
        reasons: `(rows, columns)` index of why there is no answer, -1 elsewhere; and the reasons.
        side: full-size pixels along a tile; coordinates are full-size pixels, as QuPath's.
        microns: along a tile.

    Returns:
        How many areas there are.

    Source: RFC 7946; QuPath's properties `objectType`, `classification` and `measurements`.
    """
    colours, scale = class_colours(len(classes)), (side, microns)
    features = [
        _feature(
            area, classes[area.label], colours[area.label], _means(area, chances, classes), scale
        )
        for area in areas(labels)
    ]
    laid, why = reasons
    features += [
        _feature(area, f"can't tell: {why[area.label]}", OPEN, {}, scale) for area in areas(laid)
    ]
    content = {"type": "FeatureCollection", "features": features}
    write_synced(path, json.dumps(content, ensure_ascii=False).encode())
    return len(features)


def _means(area: Area, chances: Float, classes: Sequence[str]) -> dict[str, float]:
    rows, columns = area.cells.T
    means = chances[:, rows, columns].mean(axis=1, dtype=np.float64)
    return {f"Probability {name}": float(mean) for name, mean in zip(classes, means, strict=True)}


def _feature(
    area: Area,
    name: str,
    colour: tuple[int, int, int],
    measured: dict[str, float],
    scale: tuple[float, float],
) -> dict[str, Any]:
    side, microns = scale
    tiles = len(area.cells)
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [_ringed(ring, side) for ring in area.rings],
        },
        "properties": {
            "objectType": "annotation",
            "name": name,
            "classification": {"name": name, "color": list(colour)},
            "measurements": {
                **measured,
                "Tiles": float(tiles),
                "Area µm^2": tiles * microns**2,
            },
        },
    }


def _ringed(ring: Ring, side: float) -> list[list[float]]:
    """Coordinates x, y of a ring: outer ones turn from x to y, as RFC 7946 asks, holes back."""
    return [[round(column * side, 2), round(row * side, 2)] for row, column in ring]
