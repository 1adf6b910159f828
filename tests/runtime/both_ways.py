"""Reads a series in both ways that there are, and holds one against the other."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import numpy as np

from cdt_runtime.ct import Volume, load_reduced, load_volume, scan_series
from cdt_runtime.dicom_walk import Unusual


def read_series(folder: str | os.PathLike[str], **options: Any) -> Volume:
    """As `cdt_runtime.ct.read_series`; fails where two ways differ.

    Headers are walked over or parsed in full; slices are read whole or reduced to area means.
    """
    series = scan_series(folder, **options)
    with patch("cdt_runtime.dicom_header.walk", side_effect=Unusual):
        parsed = scan_series(folder, **options)
    assert repr(series.frames) == repr(parsed.frames)
    assert (repr(series.geometry), series.warnings) == (repr(parsed.geometry), parsed.warnings)
    volume = load_volume(series)
    depth, rows, columns = volume.hu.shape
    for side in (128, 100) if min(rows, columns) >= 128 else (2, 3):
        exact = _shares(rows, side) @ volume.hu.astype(np.float64) @ _shares(columns, side).T
        for thick in {1, max(1, depth // 3), max(1, depth - 1), depth}:
            expected = np.tensordot(_shares(depth, thick), exact, axes=1)
            found = load_reduced(series, (thick, side, side))
            np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)
    return volume


def _shares(count: int, side: int) -> np.ndarray:
    """How much of each of `count` cells lies in each of `side` boxes, by the running integral."""
    until = np.vstack([np.zeros(count), np.cumsum(np.eye(count), axis=0)])
    edges = np.linspace(0, count, side + 1)
    at_edges = [np.interp(edges, np.arange(count + 1), column) for column in until.T]
    return np.diff(np.stack(at_edges, axis=1), axis=0) * (side / count)
