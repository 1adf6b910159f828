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


def write_geojson(
    path: Path,
    labels: NDArray[np.int16],
    chances: Float,
    classes: Sequence[str],
    *,
    side: float,
    microns: float,
) -> int:
    """Write one annotation an area of neighbouring tiles of a class.

    Args:
        path: of the file.
        labels: `(rows, columns)` index of the class, -1 without an answer.
        chances: `(K, rows, columns)` probabilities, NaN without an answer.
        classes: K names.
        side: full-size pixels along a tile; coordinates are full-size pixels, as QuPath's.
        microns: along a tile.

    Returns:
        How many areas there are.

    Source: RFC 7946; QuPath's properties `objectType`, `classification` and `measurements`.
    """
    colours = class_colours(len(classes))
    features = [
        _feature(area, classes, colours[area.label], chances, side, microns)
        for area in areas(labels)
    ]
    content = {"type": "FeatureCollection", "features": features}
    write_synced(path, json.dumps(content, ensure_ascii=False).encode())
    return len(features)


def _feature(
    area: Area,
    classes: Sequence[str],
    colour: tuple[int, int, int],
    chances: Float,
    side: float,
    microns: float,
) -> dict[str, Any]:
    rows, columns = area.cells.T
    means = chances[:, rows, columns].mean(axis=1, dtype=np.float64)
    measured = {
        f"Probability {name}": float(mean) for name, mean in zip(classes, means, strict=True)
    }
    measured["Tiles"] = float(len(rows))
    measured["Area µm^2"] = len(rows) * microns**2
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [_scaled(ring, side) for ring in area.rings],
        },
        "properties": {
            "objectType": "annotation",
            "name": classes[area.label],
            "classification": {"name": classes[area.label], "color": list(colour)},
            "measurements": measured,
        },
    }


def _scaled(ring: Ring, side: float) -> list[list[float]]:
    """Coordinates x, y of a ring: outer ones turn from x to y, as RFC 7946 asks, holes back."""
    return [[round(column * side, 2), round(row * side, 2)] for row, column in ring]
