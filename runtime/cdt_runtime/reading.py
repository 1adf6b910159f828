"""Files from outside, read in the decoding process: tiles, CT series and slides.

    read_tile     one tile
    scan_series   a CT series: its headers now, its pixels when asked for
    read_series   a CT series as a volume
    open_slide    a slide: its facts now, its pixels when asked for

Each gives what the decoders give, or one error that names the input, also where a decoder crashes,
hangs or takes all memory (see `cdt_runtime.sandbox`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.ct_walk import shown_name
from cdt_runtime.errors import SeriesError, TileError
from cdt_runtime.printable import last_part
from cdt_runtime.sandbox.process import SANDBOX, Subject, Talk
from cdt_runtime.tile import Tile
from cdt_runtime.volume import Volume

if TYPE_CHECKING:
    from cdt_runtime.slides.tissue import Small
    from cdt_runtime.tiff_meta import Z

COARSER = 1.1
"""A level of a slide may be coarser than what is asked for by this factor."""

Float = NDArray[np.float32]
Pixels = NDArray[Any]


def read_tile(
    path: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    mpp: float | None = None,
    z: Z = None,
) -> Tile:
    """Read one tile.

    Args:
        path: A TIFF, PNG or JPEG file, or a folder with one single-channel image a marker.
        channels: The names of the channels of a file that has none, in the file's order.
        mpp: Microns a pixel; goes before what the file says.
        z: Which plane of an OME-TIFF's stack, counted from 1, or "max" for the maximum of all.

    Raises:
        TileError: The tile can't be used; the message names the file, the fault and the cure.
    """
    names = None if channels is None else list(channels)
    facts, (pixels,) = SANDBOX.ask(
        Subject(last_part(Path(path)), TileError),
        "tile",
        path=_absolute(path),
        channels=names,
        mpp=mpp,
        z=z,
    )
    return Tile(
        pixels,
        tuple(facts["channels"]),
        facts["bits"],
        facts["mpp"],
        facts["sha256"],
        facts["source"],
        tuple(facts["warnings"]),
    )


@dataclass(frozen=True, eq=False)
class ScannedSeries:
    """A CT series whose headers were read and found good.

    Attributes:
        state: differs where a file was changed, moved or copied, on this machine.
        description: size and spacing in words; never any header text.
        shape: `(D, H, W)` voxels of the volume that it becomes.
        warnings: one line each.
    """

    state: str
    description: str
    shape: tuple[int, int, int]
    warnings: tuple[str, ...]
    _subject: Subject = field(repr=False)
    _options: dict[str, Any] = field(repr=False)

    def reduced(self, shape: tuple[int, int, int]) -> Float:
        """Decode it slice by slice to small means, as `cdt_runtime.ct.load_reduced`.

        Args:
            shape: `(D, side, side)` of the result.

        Raises:
            SeriesError: a file changed since the scan, or its pixels are damaged.
        """
        _, (means,) = SANDBOX.ask(
            self._subject, "means", state=self.state, shape=list(shape), **self._options
        )
        return means

    def references(self) -> list[dict[str, Any]]:
        """Return what a report has to repeat of the header of each file, in DICOM's JSON.

        It holds the patient's name: it goes into DICOM reports, and nowhere else.

        Raises:
            SeriesError: a file changed since the scan.
        """
        facts, _ = SANDBOX.ask(self._subject, "references", state=self.state, **self._options)
        return list(facts["references"])

    def volume(self) -> Volume:
        """Decode it whole.

        Raises:
            SeriesError: as `reduced`.
        """
        facts, (hu,) = SANDBOX.ask(self._subject, "volume", state=self.state, **self._options)
        across, down, up = map(_vector, facts["direction"])
        return Volume(
            hu=hu,
            spacing_mm=_vector(facts["spacing_mm"]),
            origin_mm=_vector(facts["origin_mm"]),
            direction=(across, down, up),
            series_hash=facts["series_hash"],
            warnings=tuple(facts["warnings"]),
        )


def _absolute(path: str | os.PathLike[str]) -> str:
    """The other process may have been started in another folder."""
    try:
        return os.path.abspath(path)
    except OSError:  # the working folder is gone
        return os.fspath(path)


def _vector(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = values
    return x, y, z


def scan_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    min_slices: int = 8,
    allow_resample: bool = False,
) -> ScannedSeries:
    """Find the CT series in a folder and check everything but its pixels.

    Args:
        folder: searched with all its subfolders; links are not followed.
        series_uid: the SeriesInstanceUID to take where there are several.
        min_slices: fewer are an error.
        allow_resample: interpolate to an even grid where slice gaps differ, instead of an error.

    Raises:
        SeriesError: no series, more than one, or one that can't become a volume.
    """
    options = {
        "folder": _absolute(folder),
        "series_uid": series_uid,
        "min_slices": min_slices,
        "allow_resample": allow_resample,
    }
    subject = Subject(shown_name(Path(folder)), SeriesError)
    facts, _ = SANDBOX.ask(subject, "scan", **options)
    return ScannedSeries(
        facts["state"],
        facts["description"],
        tuple(facts["shape"]),
        tuple(facts["warnings"]),
        subject,
        options,
    )


def read_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    min_slices: int = 8,
    allow_resample: bool = False,
) -> Volume:
    """Read a CT series as a volume: `scan_series`, then its pixels."""
    return scan_series(
        folder, series_uid=series_uid, min_slices=min_slices, allow_resample=allow_resample
    ).volume()


@dataclass(frozen=True)
class SlideLevel:
    """One resolution of a slide.

    Attributes:
        index: among the levels, finest first.
        height: pixels.
        width: pixels.
        downsample: full-size pixels that one of its pixels stands for, along an axis.
    """

    index: int
    height: int
    width: int
    downsample: float


@dataclass(frozen=True, eq=False)
class Slide:
    """A slide, open for reading.

    Attributes:
        source: the name to show.
        levels: finest first.
        channels: names, `("R", "G", "B")` or markers.
        bits: significant bits of an integer sample, 32 for float.
        mpp: microns a pixel of the finest level, or None where the file does not say.
        warnings: one line each.
        references: of a slide in DICOM, the headers of its files that a report repeats, in DICOM's
            JSON; they hold the patient's name.
    """

    source: str
    levels: tuple[SlideLevel, ...]
    channels: tuple[str, ...]
    bits: int
    mpp: float | None
    warnings: tuple[str, ...]
    references: Sequence[Mapping[str, Any]] = field(repr=False)
    _talk: Talk = field(repr=False)

    def small_copy(self, glass: int) -> Small:
        """Average blocks of pixels to a copy of at most 2048 pixels a side.

        Args:
            glass: value of samples where nothing is stored.
        """
        from cdt_runtime.slides.tissue import Small

        self._talk.ask("small", glass=glass)
        facts, (pixels, damaged) = self._talk.hear()
        down, across = facts["scale"]
        return Small(pixels, (down, across), damaged)

    def tiles(
        self, level: SlideLevel, side: float, places: NDArray[np.int64], glass: int, size: int
    ) -> Iterator[list[Pixels | str]]:
        """Read the tiles of a grid, in the order given; the next ones are decoded meanwhile.

        Args:
            level: to read.
            side: pixels of the level along a tile, not always whole.
            places: `(n, 2)` row and column.
            glass: value of samples where nothing is stored.
            size: tiles that are given at a time.

        Yields:
            For each tile its pixels `(h, w, C)`, or why it can't be read.
        """
        asked = {"level": level.index, "side": side, "glass": glass, "size": size}
        self._talk.ask("tiles", places=places.tolist(), **asked)
        for _ in range(-(-len(places) // size)):
            self._talk.ask("more")
            facts, arrays = self._talk.hear()
            pixels, lost = iter(arrays), {int(at): str(why) for at, why in facts["lost"]}
            yield [
                lost[at] if at in lost else next(pixels) for at in range(len(arrays) + len(lost))
            ]
        self._talk.hear()


@contextmanager
def open_slide(path: Path, channels: Sequence[str] | None = None) -> Iterator[Slide]:
    """Open a slide: OME-TIFF, SVS, any other TIFF in tiles or strips, or one in DICOM.

    Args:
        path: the file; of a slide in DICOM the folder of its files, or one of them.
        channels: names for the channels of a file that has none.

    Raises:
        TileError: it can't be used; the message names the file, the fault and the cure.
    """
    with SANDBOX.conversation(Subject(last_part(path), TileError)) as talk:
        names = None if channels is None else list(channels)
        talk.ask("slide", path=_absolute(path), channels=names)
        facts, _ = talk.hear()
        yield Slide(
            facts["source"],
            tuple(SlideLevel(at, *level) for at, level in enumerate(facts["levels"])),
            tuple(facts["channels"]),
            facts["bits"],
            facts["mpp"],
            tuple(facts["warnings"]),
            facts["references"],
            talk,
        )


def level_for(slide: Slide, mpp: float, finest_mpp: float) -> SlideLevel:
    """Choose the coarsest level that still shows what is asked for.

    Args:
        slide: open.
        mpp: microns a pixel that are asked for.
        finest_mpp: of its finest level.
    """
    fine_enough = [one for one in slide.levels if one.downsample * finest_mpp <= COARSER * mpp]
    return fine_enough[-1] if fine_enough else slide.levels[0]
