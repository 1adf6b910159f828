"""A slide in DICOM (VL Whole Slide Microscopy): the files of one, read through wsidicom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.dicom_header import HEAD_BYTES
from cdt_runtime.dicom_quiet import quiet
from cdt_runtime.dicom_references import read_reference
from cdt_runtime.errors import MissingDependencyError, TileError
from cdt_runtime.printable import counted, last_part
from cdt_runtime.slides.box import Box
from cdt_runtime.tile import RGB

Pixels = NDArray[Any]

MAX_FILES = 1000
WSI_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
FRAMES = 256
"""Decoded frames that are kept: a strip of tiles, several frames wide."""


def is_dicom_slide(path: Path) -> bool:
    """Whether a path is a folder, or a file that begins as DICOM does."""
    try:
        if path.is_dir():
            return True
        with path.open("rb") as file:
            return file.read(HEAD_BYTES).endswith(b"DICM")
    except OSError:
        return False


@dataclass(frozen=True, eq=False)
class DicomLevel:
    """One resolution of a slide in DICOM.

    Attributes:
        height: pixels.
        width: pixels.
        downsample: full-size pixels that one of its pixels stands for, along an axis.
        dtype: of its samples.
    """

    height: int
    width: int
    downsample: float
    _slide: Any = field(repr=False)
    _level: int = field(repr=False)
    dtype = np.dtype(np.uint8)

    def regions(self, glass: int) -> DicomRegions:
        """Begin to read it."""
        return DicomRegions(self, glass)

    def read(self, box: Box) -> Pixels:
        """Return the pixels of a box, `(height, width, 3)`.

        Raises:
            TileError: a frame is damaged.
        """
        try:
            with quiet():
                found = self._slide.read_region(
                    (box.left, box.top), self._level, (box.width, box.height), as_array=True
                )
        except MemoryError:
            raise
        except Exception as error:  # any kind: decoders of pixels raise what they like
            raise TileError(
                f"the frames at row {box.top}, column {box.left} can't be decoded "
                f"({type(error).__name__}): fetch the slide again"
            ) from None
        return np.asarray(found)[..., :3]


class DicomRegions:
    """Reads boxes of a level; as `slides.regions.Regions`, which see."""

    channels = len(RGB)

    def __init__(self, level: DicomLevel, glass: int) -> None:
        self._level, self._glass = level, glass

    def __enter__(self) -> DicomRegions:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def want(self, box: Box) -> None:
        """Nothing is begun ahead."""

    def read(self, box: Box) -> Pixels:
        """Return the pixels of a box; beyond the slide there is glass.

        Raises:
            TileError: a frame is damaged.
        """
        height = min(box.height, self._level.height - box.top)
        width = min(box.width, self._level.width - box.left)
        pixels = np.full((box.height, box.width, self.channels), self._glass, np.uint8)
        pixels[:height, :width] = self._level.read(Box(box.top, box.left, height, width))
        return pixels

    def read_what_can_be(self, box: Box) -> tuple[Pixels, dict[Box, TileError]]:
        """Return the pixels of a box, and the box itself where it is damaged."""
        try:
            return self.read(box), {}
        except TileError as error:
            shape = (box.height, box.width, self.channels)
            return np.full(shape, self._glass, np.uint8), {box: error}

    def forget_above(self, row: int) -> None:
        """The library forgets by itself."""

    def forget_all_but(self, boxes: Iterable[Box]) -> None:
        """The library forgets by itself."""


@dataclass(frozen=True, eq=False)
class DicomSlide:
    """An open slide; its attributes are those of `slides.pyramid.Pyramid`."""

    source: str
    levels: tuple[DicomLevel, ...]
    mpp: float | None
    references: list[dict[str, Any]]
    channels: tuple[str, ...] = RGB
    bits: int = 8
    warnings: tuple[str, ...] = ()


@contextmanager
def open_dicom_slide(path: Path) -> Iterator[DicomSlide]:
    """Open a slide.

    Args:
        path: folder of the files of one slide, or a file of one of its levels.

    Raises:
        TileError: it can't be used; the message says why, and shows nothing of the headers.
        MissingDependencyError: wsidicom is not installed.
    """
    try:
        from wsidicom import Settings, WsiDicom
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "slides in DICOM need wsidicom, which is not installed: pip install 'cdt-edge[dicom]'"
        ) from error
    files = _files(path)
    settings = Settings(decoded_frame_cache_size=FRAMES)
    with ExitStack() as opened:
        try:
            with quiet():
                references = _references(files)
                slide = opened.enter_context(WsiDicom.open(files, settings=settings))
                found = _described(last_part(path), slide, references)
        except (MemoryError, TileError):
            raise
        except Exception as error:  # any kind: pydicom converts on access
            raise TileError(
                f"is no whole slide in DICOM that can be read ({type(error).__name__}): give the "
                "folder of one slide's files"
            ) from None
        yield found


def slide_files(path: Path) -> list[Path]:
    """The files of a slide: itself, or those below a folder; links are not followed."""
    if not path.is_dir():
        return [path]
    found = (entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    return sorted(found)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = slide_files(path)
    files = [entry for entry in found[:MAX_FILES] if is_dicom_slide(entry)]
    if not files:
        raise TileError(
            f"is a folder without DICOM files ({counted(len(found), 'file')} seen): a slide is a "
            "file, or the folder of one slide in DICOM"
        )
    return files


def _references(files: list[Path]) -> list[dict[str, Any]]:
    """What a report needs to refer to the files of the slide.

    Raises:
        TileError: there is none, or there are several: the library would choose one in silence.
    """
    found = [read_reference(file) for file in files]
    slides = [one for one in found if one.get("SOPClassUID", {}).get("Value") == [WSI_CLASS]]
    if not slides:
        raise TileError(
            f"holds no whole slide in DICOM ({counted(len(found), 'file')} of another kind): give "
            "the folder of one slide's files"
        )
    count = len({repr(one.get("SeriesInstanceUID")) for one in slides})
    if count > 1:
        raise TileError(f"holds {count} slides: give the folder of one slide's files")
    return slides


def _described(name: str, slide: Any, references: list[dict[str, Any]]) -> DicomSlide:
    """Hold what the library says against what we can read."""
    if len(slide.pyramids) != 1:
        raise TileError(f"holds {len(slide.pyramids)} images of different places: give one of them")
    finest = slide.levels[0]
    image = finest.default_instance.dataset
    if image.samples_per_pixel != len(RGB) or image.bits != 8:
        raise TileError("is no slide in 8-bit colour: give one in RGB, or an OME-TIFF")
    levels = tuple(
        DicomLevel(
            level.size.height,
            level.size.width,
            (finest.size.width / level.size.width + finest.size.height / level.size.height) / 2,
            slide,
            level.level,
        )
        for level in slide.levels
    )
    spacing = finest.mpp
    square = abs(spacing.width / spacing.height - 1) < 0.01
    if not square:
        raise TileError(
            f"has pixels of {spacing.width:g} x {spacing.height:g} microns: expected square ones"
        )
    return DicomSlide(name, levels, float(spacing.width), references)
