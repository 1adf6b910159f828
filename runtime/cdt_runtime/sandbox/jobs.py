"""What the decoding process can be asked for: tiles, series and slides."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from cdt_runtime.ct_folder import MAX_FILES
from cdt_runtime.ct_walk import entries, find_folder, is_regular
from cdt_runtime.errors import SeriesError, TileError, naming
from cdt_runtime.sandbox.limits import cpu_seconds
from cdt_runtime.sandbox.worker import Talk

KEPT = 4
"""Scanned series that are kept for the pixels to be asked for."""


def tile(talk: Talk, path: str, **options: Any) -> None:
    """Read a tile: its facts, and its pixels `(H, W, C)`."""
    from cdt_runtime.tile import read_tile

    seconds = cpu_seconds(*_size_of(Path(path)))
    talk.expect(seconds)
    with talk.limits.granted(seconds):
        found = read_tile(path, **options)
        facts = {
            "channels": found.channels,
            "bits": found.bits,
            "mpp": found.mpp,
            "sha256": found.sha256,
            "source": found.source,
            "warnings": found.warnings,
        }
        talk.say(facts, [found.pixels])


def _size_of(path: Path) -> tuple[int, int]:
    """Bytes and number of the files at a path; of a folder those in it."""
    try:
        if not path.is_dir():
            return path.stat().st_size, 1
        with os.scandir(path) as found:
            sizes = [entry.stat().st_size for entry in found if entry.is_file()]
        return sum(sizes), len(sizes)
    except OSError:
        return 0, 1  # reading it will say what is wrong


class _Scans:
    """The series that were scanned last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def put(self, series: Any) -> None:
        with self._lock:
            self._kept[series.state] = series
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def get(self, state: str) -> Any:
        with self._lock:
            return self._kept.get(state)


_SCANS = _Scans()


def _seconds_of(folder: str) -> float:
    """Processor time for all files below a folder, as many as the scan takes."""
    size, files = 0, 0
    try:
        if (root := find_folder(Path(folder))) is not None:
            for entry in islice(entries(root), MAX_FILES):
                files += 1
                if is_regular(entry):
                    size += entry.stat(follow_symlinks=False).st_size
    except (SeriesError, OSError):
        pass  # the scan will say what is wrong
    return cpu_seconds(size, files)


def scan(talk: Talk, folder: str, **options: Any) -> None:
    """Read the headers of a series: its facts."""
    seconds = _seconds_of(folder)
    talk.expect(seconds)
    with talk.limits.granted(seconds):
        series = _scanned(folder, options)
    talk.say(
        {
            "state": series.state,
            "description": series.description,
            "warnings": series.warnings,
            "shape": series.geometry.shape,
        }
    )


def _scanned(folder: str, options: dict[str, Any]) -> Any:
    from cdt_runtime.ct import scan_series

    series = scan_series(folder, **options)
    _SCANS.put(series)
    return series


def _found_again(folder: str, options: dict[str, Any], state: str) -> Any:
    """The series that was scanned, by now perhaps in another process.

    Raises:
        SeriesError: it is not what it was then.
    """
    series = _SCANS.get(state) or _scanned(folder, options)
    if series.state != state:
        raise SeriesError(
            f"{Path(folder).name}: the files changed while they were read: run it again"
        )
    return series


def means(talk: Talk, folder: str, state: str, shape: list[int], **options: Any) -> None:
    """Decode a scanned series to small means, `shape`."""
    from cdt_runtime.ct import load_reduced

    seconds = _seconds_of(folder)
    talk.expect(seconds)
    with talk.limits.granted(seconds):
        series = _found_again(folder, options, state)
        depth, height, width = shape
        talk.say({}, [load_reduced(series, (depth, height, width))])


def volume(talk: Talk, folder: str, state: str, **options: Any) -> None:
    """Decode a scanned series whole, `(D, H, W)` HU."""
    from cdt_runtime.ct import load_volume

    seconds = _seconds_of(folder)
    talk.expect(seconds)
    with ExitStack() as granted:
        granted.enter_context(talk.limits.granted(seconds))
        series = _found_again(folder, options, state)
        stored = 4 * len(series.frames) * int(np.prod(series.geometry.shape[1:]))
        whole = 4 * int(np.prod(series.geometry.shape))
        granted.enter_context(talk.limits.granted(0, stored + 2 * whole))
        found = load_volume(series)
        facts = {
            "spacing_mm": found.spacing_mm,
            "origin_mm": found.origin_mm,
            "direction": found.direction,
            "series_hash": found.series_hash,
            "warnings": found.warnings,
        }
        talk.say(facts, [found.hu])


def references(talk: Talk, folder: str, state: str, **options: Any) -> None:
    """Read of a scanned series what a report has to repeat of the header of each file."""
    from cdt_runtime.dicom_quiet import quiet
    from cdt_runtime.dicom_references import read_reference

    seconds = _seconds_of(folder)
    talk.expect(seconds)
    with talk.limits.granted(seconds), quiet():
        series = _found_again(folder, options, state)
        paths = dict.fromkeys(frame.file.path for frame in series.frames)
        talk.say({"references": [read_reference(Path(path)) for path in paths]})


def slide(talk: Talk, path: str, channels: list[str] | None) -> None:
    """Open a slide: its facts, and then as often as wished a small copy or its tiles."""
    from cdt_runtime.slides.pyramid import open_pyramid

    is_folder = Path(path).is_dir()
    seconds = _seconds_of(path) if is_folder else cpu_seconds(*_size_of(Path(path)))
    talk.expect(seconds)
    with ExitStack() as opened:
        with talk.limits.granted(seconds):
            pyramid = opened.enter_context(open_pyramid(Path(path), channels))
        talk.say(
            {
                "source": pyramid.source,
                "levels": [[one.height, one.width, one.downsample] for one in pyramid.levels],
                "channels": pyramid.channels,
                "bits": pyramid.bits,
                "mpp": pyramid.mpp,
                "warnings": pyramid.warnings,
                "references": pyramid.references,
            }
        )
        while True:
            request = talk.hear()
            with talk.limits.granted(seconds):
                _SLIDE_JOBS[request["job"]](talk, pyramid, seconds, **request["of"])


def _small(talk: Talk, pyramid: Any, seconds: float, glass: int) -> None:
    from cdt_runtime.slides.tissue import small_copy

    talk.expect(seconds)
    found = small_copy(pyramid, glass)
    talk.say({"scale": found.scale}, [found.pixels, found.damaged])


def _tiles(
    talk: Talk,
    pyramid: Any,
    seconds: float,
    level: int,
    side: float,
    places: list[tuple[int, int]],
    glass: int,
    size: int,
) -> None:
    """Send the pixels of tiles, `size` of them a message, each message asked for by the other."""
    from cdt_runtime.slides.cutting import tiles_ahead
    from cdt_runtime.slides.regions import open_regions

    talk.expect(seconds)
    pixels: list[Any] = []
    lost: dict[int, str] = {}

    def say() -> None:
        talk.hear()
        talk.expect(seconds)
        talk.say({"lost": list(lost.items())}, pixels)
        pixels.clear()
        lost.clear()

    with naming(pyramid.source):
        regions = open_regions(pyramid.levels[level], glass)
    with regions:
        for box in tiles_ahead(regions, side, np.array(places, np.int64).reshape(-1, 2)):
            try:
                pixels.append(regions.read(box))
            except TileError as error:
                lost[len(pixels) + len(lost)] = str(error)
            if len(pixels) + len(lost) == size:
                say()
        if pixels or lost:
            say()
    talk.say({"end": True})


_SLIDE_JOBS: dict[str, Callable[..., None]] = {"small": _small, "tiles": _tiles}

JOBS: dict[str, Callable[..., None]] = {
    "tile": tile,
    "scan": scan,
    "means": means,
    "volume": volume,
    "references": references,
    "slide": slide,
}
