"""The strict first look at a TIFF file: headers and directories, before any decoder sees a byte.

Classic TIFF and BigTIFF in both byte orders. Loops, offsets outside the file and absurd counts
end here as `TileError`s without the file's name, which the caller puts in front.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from cdt_runtime.errors import TileError

MAX_PAGES = 512
MAX_TAGS = 1024
MAX_VALUES = 1024
"""Most values of a tag that has one value a page or a sample."""

MAX_VALUE_BYTES = 8 * 2**20
"""Longest value of one tag that is read: the OME-XML of a large experiment fits."""

# TIFF type -> (bytes, struct code); text and unknown types have no code.
_TYPES = {
    1: (1, "B"),
    2: (1, ""),
    3: (2, "H"),
    4: (4, "I"),
    5: (8, "II"),
    6: (1, "b"),
    7: (1, ""),
    8: (2, "h"),
    9: (4, "i"),
    10: (8, "ii"),
    11: (4, "f"),
    12: (8, "d"),
    13: (4, "I"),
    16: (8, "Q"),
    17: (8, "q"),
    18: (8, "Q"),
}
_INTEGERS = (1, 3, 4, 13, 16, 18)
_RE_SAVE = "write the file again, or fetch it again"


@dataclass(frozen=True)
class Entry:
    """One directory entry: where a tag's values lie, not yet read."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True)
class Source:
    """An open TIFF: the file, its size in bytes and its byte order (`<` or `>`)."""

    file: BinaryIO
    size: int
    order: str
    big: bool

    def read(self, offset: int, count: int, what: str) -> bytes:
        """`count` bytes at `offset`; a range that leaves the file is a TileError naming `what`."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise TileError(
                f"{what} lies at bytes {offset} to {offset + count} of a file of {self.size}: "
                f"the file is truncated or damaged; {_RE_SAVE}"
            )
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) != count:
            raise TileError(f"{what} could not be read in full: the file changed; read it again")
        return data


@dataclass(frozen=True)
class Ifd:
    """One directory (page) whose values are read on demand."""

    source: Source
    index: int
    entries: dict[int, Entry]

    def __contains__(self, tag: object) -> bool:
        return tag in self.entries

    def count(self, tag: int) -> int:
        """How many values a tag claims, without reading them."""
        return self.entries[tag].count if tag in self.entries else 0

    def data(self, tag: int) -> bytes:
        """The raw bytes of a tag's value; empty where the tag is absent."""
        entry = self.entries.get(tag)
        if entry is None:
            return b""
        if entry.kind not in _TYPES:
            raise TileError(f"{self._name(tag)} has the unknown type {entry.kind}; {_RE_SAVE}")
        size = _TYPES[entry.kind][0] * entry.count
        if size > MAX_VALUE_BYTES:
            raise TileError(f"{self._name(tag)} claims {entry.count} values: damaged; {_RE_SAVE}")
        return self.source.read(entry.offset, size, self._name(tag))

    def ints(self, tag: int, most: int = MAX_VALUES) -> tuple[int, ...]:
        """The whole numbers of a tag, at most `most`; empty where the tag is absent."""
        if self.count(tag) > most:
            raise TileError(
                f"{self._name(tag)} claims {self.count(tag)} values, expected {most} or fewer: "
                "damaged"
            )
        return tuple(int(value) for value in self._unpack(tag, _INTEGERS, "whole numbers"))

    def one(self, tag: int, default: int | None = None) -> int:
        """The single whole number of a tag, or `default`."""
        values = self.ints(tag)
        if not values:
            if default is None:
                raise TileError(f"{self._name(tag)} is missing: not a usable TIFF; {_RE_SAVE}")
            return default
        return values[0]

    def same(self, tag: int, default: int) -> int:
        """The number that a per-sample tag gives every sample; unequal samples are a TileError."""
        values = self.ints(tag) or (default,)
        if len(set(values)) != 1:
            raise TileError(
                f"{self._name(tag)} is {values[:8]}: samples that differ are not read; "
                "save every channel with the same bits"
            )
        return values[0]

    def ratio(self, tag: int) -> float:
        """A RATIONAL as a number; 0.0 where absent or not a ratio of positive numbers."""
        if self.count(tag) != 1 or self.entries[tag].kind != 5:
            return 0.0
        values = self._unpack(tag, (5,), "a ratio")
        if len(values) < 2 or values[1] == 0:
            return 0.0
        return float(values[0]) / float(values[1])

    def text(self, tag: int) -> str:
        """An ASCII (in practice UTF-8) tag up to its NUL; empty where absent."""
        raw = self.data(tag).split(b"\0", 1)[0]
        return raw.decode("utf-8", errors="replace").strip()

    def _unpack(self, tag: int, kinds: tuple[int, ...], what: str) -> tuple[float, ...]:
        if tag not in self.entries:
            return ()
        kind = self.entries[tag].kind
        if kind not in kinds:
            raise TileError(f"{self._name(tag)} has type {kind}, expected {what}; {_RE_SAVE}")
        size, code = _TYPES[kind]
        raw = self.data(tag)
        return struct.unpack(f"{self.source.order}{len(raw) // size * len(code)}{code[0]}", raw)

    def _name(self, tag: int) -> str:
        return f"TIFF tag {TAG_NAMES.get(tag, tag)} of page {self.index}"


# The tags that decide how pixels are read, and what they are called.
TAG_NAMES = {
    254: "NewSubfileType",
    256: "ImageWidth",
    257: "ImageLength",
    258: "BitsPerSample",
    259: "Compression",
    262: "PhotometricInterpretation",
    266: "FillOrder",
    270: "ImageDescription",
    273: "StripOffsets",
    274: "Orientation",
    277: "SamplesPerPixel",
    278: "RowsPerStrip",
    279: "StripByteCounts",
    282: "XResolution",
    283: "YResolution",
    284: "PlanarConfiguration",
    296: "ResolutionUnit",
    317: "Predictor",
    320: "ColorMap",
    322: "TileWidth",
    323: "TileLength",
    324: "TileOffsets",
    325: "TileByteCounts",
    330: "SubIFDs",
    338: "ExtraSamples",
    339: "SampleFormat",
    347: "JPEGTables",
}


def scan(file: BinaryIO) -> list[Ifd]:
    """The directories of the main chain, in file order.

    Args:
        file: An open, seekable binary file.

    Raises:
        TileError: The header or the chain of directories is damaged, loops or exceeds the limits.
    """
    source, offset = _header(file)
    pages: list[Ifd] = []
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise TileError(f"its chain of TIFF pages loops back after page {len(pages)}: damaged")
        if len(pages) == MAX_PAGES:
            raise TileError(f"holds more than {MAX_PAGES} TIFF pages; crop and export one tile")
        seen.add(offset)
        entries, offset = _directory(source, offset, len(pages))
        pages.append(Ifd(source, len(pages), entries))
    if not pages:
        raise TileError(f"has a TIFF header but no image behind it: truncated; {_RE_SAVE}")
    return pages


def sub_directories(ifd: Ifd) -> list[Ifd]:
    """The directories that a page lists as its own: reduced copies of it, in file order.

    Raises:
        TileError: A directory is damaged, or there are more than `MAX_PAGES`.
    """
    offsets = ifd.ints(330, MAX_PAGES)
    return [
        Ifd(ifd.source, ifd.index, _directory(ifd.source, offset, ifd.index)[0])
        for offset in offsets
    ]


def _header(file: BinaryIO) -> tuple[Source, int]:
    """The source and the offset of its first directory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = len(head) >= 4 and struct.unpack(f"{order}H", head[2:4])[0] == 43
    source = Source(file, size, order, big)
    if big:
        width, zero, offset = struct.unpack(f"{order}HHQ", source.read(4, 12, "the TIFF header"))
        if (width, zero) != (8, 0):
            raise TileError(f"has a damaged BigTIFF header (offset size {width}); {_RE_SAVE}")
        return source, offset
    return source, struct.unpack(f"{order}I", source.read(4, 4, "the TIFF header"))[0]


def _directory(source: Source, offset: int, index: int) -> tuple[dict[int, Entry], int]:
    """The entries of the directory at `offset`, and the offset of the next one (0 at the end)."""
    what = f"TIFF page {index}"
    count_code, item, link = ("Q", 20, "Q") if source.big else ("H", 12, "I")
    width = struct.calcsize(f"<{count_code}")
    (count,) = struct.unpack(source.order + count_code, source.read(offset, width, what))
    if not 0 < count <= MAX_TAGS:
        raise TileError(f"{what} claims {count} tags, expected 1 to {MAX_TAGS}: damaged")
    start = offset + width
    table = source.read(start, count * item, what)
    (following,) = struct.unpack(
        source.order + link, source.read(start + count * item, struct.calcsize(f"<{link}"), what)
    )
    return dict(_entries(source, table, start, item)), following


def _entries(source: Source, table: bytes, start: int, item: int) -> Iterator[tuple[int, Entry]]:
    number = "Q" if source.big else "I"
    inline = struct.calcsize(f"<{number}")
    seen: set[int] = set()
    for at in range(0, len(table), item):
        tag, kind, count, value = struct.unpack_from(f"{source.order}HH{number}{number}", table, at)
        if tag in seen and tag in TAG_NAMES:  # readers differ in which of two values they take
            raise TileError(f"TIFF tag {TAG_NAMES[tag]} stands twice on a page: damaged")
        seen.add(tag)
        fits = _TYPES.get(kind, (inline + 1, ""))[0] * count <= inline
        yield tag, Entry(kind, count, start + at + item - inline if fits else value)
