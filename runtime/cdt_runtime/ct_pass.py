"""A scanned series -> the small volume that a model takes in, slice by slice: no large one is held.

Slices that count alike in the same output slices are summed as the whole numbers that they are
stored as, a few at a time: enough that threads seldom wait for each other, few enough to stay in
the cache. What comes out does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from cdt_runtime.ct_geometry import Geometry
from cdt_runtime.ct_reduce import Reducer
from cdt_runtime.dicom_frame import Frame
from cdt_runtime.dicom_pixels import Payload, cells_of, is_raw, payloads, read_raw
from cdt_runtime.parallel import side_by_side
from cdt_runtime.preprocess import resize_matrix

Float = npt.NDArray[np.float32]

MAX_THREADS = 8

BATCH_BYTES = 3 << 20
"""Six slices of 512 x 512: one at a time takes two threads half as long again."""


@dataclass(frozen=True)
class Batch:
    """Slices that are read together: raw ones with pixels of one kind, or a single one.

    Attributes:
        place: among the batches.
        frames: at least one.
    """

    place: int
    frames: tuple[Frame, ...]

    @property
    def is_raw(self) -> bool:
        """Whether its pixels lie in the files as they are."""
        return is_raw(self.frames[0].file)

    @property
    def size(self) -> int:
        """Bytes of its pixels when they are not compressed."""
        return len(self.frames) * self.frames[0].layout.frame_bytes


Take = Callable[[Batch, npt.NDArray[Any]], None]
"""Takes a batch and its cells, `(count * rows, columns)`, which may be overwritten."""


def each_batch(batches: Sequence[Batch], taker: Callable[[], Take]) -> None:
    """Read batches side by side, a file that is not raw once for all of them.

    Args:
        batches: any number.
        taker: called for each thread; what it gives takes the batches that the thread reads.

    Raises:
        SeriesError: a file changed since the scan, or its pixels are damaged.
    """
    largest = max(batch.size for batch in batches)

    def worker() -> Callable[[list[Batch]], None]:
        take, room = taker(), np.empty(largest, np.uint8).data

        def do(job: list[Batch]) -> None:
            for batch, payload, frame in _read_raw(job, room) if job[0].is_raw else _decoded(job):
                take(batch, cells_of(payload, frame, len(batch.frames)))

        return do

    side_by_side(worker, _jobs(batches), MAX_THREADS)


def _jobs(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches that one thread reads in one go."""
    raw = [[batch] for batch in batches if batch.is_raw]
    rest = [batch for batch in batches if not batch.is_raw]
    rest.sort(key=_path)
    return raw + [list(group) for _, group in groupby(rest, key=_path)]


def _path(batch: Batch) -> str:
    return batch.frames[0].file.path


def _read_raw(job: Sequence[Batch], room: memoryview) -> Iterator[tuple[Batch, Payload, Frame]]:
    for batch in job:
        first, size = batch.frames[0], batch.frames[0].layout.frame_bytes
        for place, frame in enumerate(batch.frames):
            read_raw(frame, room[place * size : (place + 1) * size])
        yield batch, room[: batch.size], first


def _decoded(job: Sequence[Batch]) -> Iterator[tuple[Batch, Payload, Frame]]:
    first = job[0].frames[0]
    wanted = {batch.frames[0].index: batch for batch in job}
    for index, payload in enumerate(payloads(first.file, first.layout)):
        if index in wanted:
            yield wanted[index], payload, wanted[index].frames[0]


def slice_shares(geometry: Geometry, count: int, depth: int) -> npt.NDArray[np.float64]:
    """How much each slice of a series counts in each output slice.

    Args:
        geometry: of the series, whose slices may have to be brought to an even grid first.
        count: of the slices.
        depth: of the output.

    Returns:
        `(depth, count)`; each row sums to 1.
    """
    at = np.array(geometry.at)
    shares = resize_matrix(len(at), depth).astype(np.float64)
    if np.array_equal(at, np.arange(count)):
        return shares
    below, rows = np.minimum(at.astype(int), count - 2), np.arange(len(at))
    grid = np.zeros((len(at), count))
    grid[rows, below] = 1 - (at - below)
    grid[rows, below + 1] = at - below
    return shares @ grid


def batches_of(frames: Sequence[Frame], shares: npt.NDArray[np.float64]) -> list[Batch]:
    """Neighbours with the same shares, as many as a batch holds."""
    most = max(1, BATCH_BYTES // frames[0].layout.frame_bytes)
    as_before = [False, *(shares[:, 1:] == shares[:, :-1]).all(axis=0)]
    runs: list[list[Frame]] = []
    for frame, alike in zip(frames, as_before, strict=True):
        if alike and len(runs[-1]) < most and _of_one_kind(runs[-1][0], frame):
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return [Batch(place, tuple(run)) for place, run in enumerate(runs)]


def _of_one_kind(a: Frame, b: Frame) -> bool:
    """Whether the pixels of two frames can be taken for those of a taller one."""
    kinds = [(one.layout, one.rescale, one.padding, one.file.syntax) for one in (a, b)]
    return is_raw(a.file) and kinds[0] == kinds[1]


def mean_volume(
    frames: Sequence[Frame], geometry: Geometry, shape: tuple[int, int, int]
) -> tuple[Float, float]:
    """Read and reduce every slice; call it inside `quiet`.

    Args:
        frames: the slices of a series, in order.
        geometry: of the series.
        shape: `(D, side, side)` of the small volume.

    Returns:
        `shape` float32 mean HU, and the lowest HU before any mean; where the files give their
        rescale that may be any value that none is below.

    Raises:
        SeriesError: as `each_batch`.
    """
    shares = slice_shares(geometry, len(frames), shape[0])
    batches = batches_of(frames, shares)
    first = np.cumsum([0, *(len(batch.frames) for batch in batches)])
    parts: dict[int, list[tuple[int, Float]]] = {}
    lowest: list[float] = []

    def taker() -> Take:
        reducer = Reducer(shape[1])

        def take(batch: Batch, cells: npt.NDArray[Any]) -> None:
            means, low = reducer.means(cells, batch.frames[0])
            weights = shares[:, first[batch.place]].astype(np.float32) * len(batch.frames)
            turned = geometry.turn(means)
            parts[batch.place] = [
                (z, turned * weights[z]) for z in np.flatnonzero(weights).tolist()
            ]
            lowest.append(low)

        return take

    each_batch(batches, taker)
    volume = np.zeros(shape, np.float32)
    for place in range(len(batches)):  # in order, for sums of floats hang on it
        for z, part in parts[place]:
            volume[z] += part
    return volume, min(lowest)
