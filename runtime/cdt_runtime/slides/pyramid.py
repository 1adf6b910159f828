"""A slide on disk: its levels, channels and microns a pixel. No pixel is read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.errors import TileError, naming
from cdt_runtime.printable import counted, last_part
from cdt_runtime.slides.dicom_wsi import DicomLevel, DicomSlide, is_dicom_slide, open_dicom_slide
from cdt_runtime.tiff import channel_names, check_photometric, stated_mpp
from cdt_runtime.tiff_ifd import Ifd, scan, sub_directories
from cdt_runtime.tiff_meta import Layout, layout
from cdt_runtime.tiff_page import Page, check_samples, parse_page
from cdt_runtime.tile import RGB

ASPECT = 0.02
"""Levels are rounded to whole pixels: their proportions agree to this share."""

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Level:
    """One resolution of a slide.

    Attributes:
        pages: one page with all channels, or one page a channel in the channels' order.
        downsample: full-size pixels that one of its pixels stands for, along an axis.
    """

    pages: tuple[Page, ...]
    downsample: float

    @property
    def height(self) -> int:
        """Pixels."""
        return self.pages[0].height

    @property
    def width(self) -> int:
        """Pixels."""
        return self.pages[0].width

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its samples."""
        return self.pages[0].dtype


AnyLevel = Level | DicomLevel


@dataclass(frozen=True, eq=False)
class Pyramid:
    """A slide, open for reading.

    Attributes:
        source: the name to show.
        levels: finest first.
        channels: names, `("R", "G", "B")` or markers.
        bits: significant bits of an integer sample, 32 for float.
        mpp: microns a pixel of the finest level, or None where the file does not say.
        warnings: one line each.
        references: what a report needs to refer to it; nothing, for it is not in DICOM.
    """

    source: str
    levels: tuple[Level, ...]
    channels: tuple[str, ...]
    bits: int
    mpp: float | None
    warnings: tuple[str, ...]
    references: tuple[()] = ()


@contextmanager
def open_pyramid(
    path: Path, channels: Sequence[str] | None = None
) -> Iterator[Pyramid | DicomSlide]:
    """Open a slide: OME-TIFF, SVS, any other TIFF in tiles or strips, or one in DICOM.

    Args:
        path: the file; of a slide in DICOM the folder of its files, or one of them.
        channels: names for the channels of a file that has none.

    Raises:
        TileError: it can't be used; the message names the file, the fault and the cure.
    """
    name = last_part(path)
    if is_dicom_slide(path):
        with naming(name), open_dicom_slide(path) as slide:
            yield slide
        return
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise TileError(f"{name}: no such file") from error
    except OSError as error:
        raise TileError(f"{name}: can't be read ({error.strerror}): check the file") from error
    with file:
        with naming(name):
            if file.read(4) not in _MAGIC:
                raise TileError("is no slide in TIFF (OME-TIFF, SVS, tiled) or DICOM: convert it")
            pyramid = _parse(name, scan(file), channels)
        yield pyramid


def _parse(name: str, ifds: list[Ifd], given: Sequence[str] | None) -> Pyramid:
    full = parse_page(ifds[0], slide=True)
    alike = [page for page in _images(ifds) if page.kind[2:] == full.kind[2:]]
    finest = tuple(page for page in alike if page.kind == full.kind)
    planes = layout(finest)
    for page in finest:
        check_samples(page)
        check_photometric(page)
    if full.photometric in (0, 3) or full.ifd.one(274, 1) != 1:
        raise TileError("is a slide with a palette, inverted or turned: save it plain and upright")
    ordered = finest if len(finest) == 1 else tuple(finest[at] for at in planes.order)
    mpp, notes = stated_mpp(full, planes)
    return Pyramid(
        source=name,
        levels=_levels(ordered, alike),
        channels=_named(full, planes, len(finest), given),
        bits=_bits(full, planes),
        mpp=mpp,
        warnings=notes,
    )


def _images(ifds: Sequence[Ifd]) -> list[Page]:
    """The pages in tiles; of a file without any, those of the first one's size.

    Thumbnails, labels and photographs of the whole slide are stored in strips.
    """
    alike = [ifd for ifd in ifds if _size(ifd) == _size(ifds[0])]
    tiled = [ifd for ifd in ifds if 322 in ifd] or alike
    return [parse_page(ifd, slide=True) for ifd in tiled]


def _size(ifd: Ifd) -> tuple[int | None, ...]:
    return tuple(ifd.one(tag, 0) for tag in (256, 257))


def _levels(finest: tuple[Page, ...], pages: Sequence[Page]) -> tuple[Level, ...]:
    """Levels from the directories that each page lists, and from smaller pages of the file."""
    full = finest[0]
    nested = [[parse_page(ifd, slide=True) for ifd in sub_directories(page.ifd)] for page in finest]
    depth = min(map(len, nested))
    groups = [tuple(pages_of[step] for pages_of in nested) for step in range(depth)]
    for size in dict.fromkeys((page.height, page.width) for page in pages):
        same = tuple(page for page in pages if (page.height, page.width) == size)
        if len(same) == len(finest):
            groups.append(same)
    levels = {full.width: Level(finest, 1.0)}
    for group in sorted(groups, key=lambda group: -group[0].width):
        down = full.width / group[0].width, full.height / group[0].height
        if group[0].width < full.width and abs(down[0] / down[1] - 1) <= ASPECT:
            levels.setdefault(group[0].width, Level(group, sum(down) / 2))
    return tuple(levels.values())


def _named(full: Page, planes: Layout, pages: int, given: Sequence[str] | None) -> tuple[str, ...]:
    """Channel names: the file's, else those of RGB, else the caller's.

    Raises:
        TileError: none has a name, or the caller names another number of them.
    """
    count = full.samples if pages == 1 else pages
    own = channel_names(planes)
    if own is None and full.photometric in (2, 6) and pages == 1 and count == len(RGB):
        own = RGB
    if own is not None:
        return own
    if given is None:
        raise TileError(
            f"has {counted(count, 'channel')} without names: name them in the file's order with "
            "--channels"
        )
    if len(given) != count:
        raise TileError(
            f"has {counted(count, 'channel')} but --channels names {len(given)}: name each once"
        )
    return tuple(given)


def _bits(full: Page, planes: Layout) -> int:
    if full.sample_format == 3:
        return 32
    if full.sample_format == 2:
        return full.bits - 1
    return planes.bits if 8 <= planes.bits < full.bits else full.bits
