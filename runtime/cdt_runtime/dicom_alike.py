"""The header of a file by that of another: the slices of a series differ in a few values.

Where a file was walked over, its layout is kept: which bytes are the tags, kinds and lengths of its
elements. A file with the same bytes in these places is not walked over any more: its values lie
where they lay there, and those that are written alike are not converted again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from cdt_runtime.dicom_syntax import Syntax
from cdt_runtime.dicom_walk import (
    CHUNK,
    KEYWORDS,
    LONG_VRS,
    SHORT_VRS,
    Unusual,
    Walked,
    value_of,
)

MOST_LAYOUTS = 8
"""Layouts that are kept: numbers of one to three digits make a few of them in a series."""

MARK = 128
"""Where the DICM mark stands, and the file meta group behind it."""

SYNTAX, POSITION = 0x00020010, KEYWORDS["ImagePositionPatient"]
_WANTED = frozenset(KEYWORDS.values())


@dataclass(frozen=True)
class _Element:
    tag: int
    vr: bytes
    head: int
    """Bytes of tag, kind and length."""
    length: int
    """Bytes of the value; 0 of the pixels, which are not looked at."""


def _elements(head: bytes, start: int, pixels: int) -> Iterator[_Element]:
    """The elements of file meta group and data set, that of the pixels last.

    Raises:
        Unusual: the data set does not begin where an element does.
    """
    place, starts = MARK + 4, False
    while place < pixels:
        starts |= place == start
        group, element, vr, length = struct.unpack_from("<HH2sH", head, place)
        size = 12 if vr in LONG_VRS else 8
        if size == 12:
            length = int.from_bytes(head[place + 8 : place + 12], "little")
        elif vr not in SHORT_VRS:
            raise Unusual
        place += size
        yield _Element(group << 16 | element, vr, size, length if place < pixels else 0)
        place += length
    if not starts:
        raise Unusual


class Layout:
    """Where the elements of one file lie, and what it holds.

    Args:
        head: its bytes up to the pixels.
        start: byte at which its data set begins.
        syntax: its transfer syntax.
        walked: what the walk found.

    Raises:
        Unusual: other files can't be read by it.
    """

    def __init__(self, head: bytes, start: int, syntax: Syntax, walked: Walked) -> None:
        self.start, self.syntax, self._found = start, syntax, walked
        fixed, wanted, gap = [f"{MARK}x4s"], [], MARK + 4
        self._kinds: list[tuple[int, bytes]] = []
        for one in _elements(head, start, walked.pixel_offset):
            if one.tag == SYNTAX:
                fixed.append(f"{one.head + one.length}s")
            else:
                fixed.append(f"{one.head}s{one.length}x")
            gap += one.head
            if one.tag in _WANTED:
                wanted.append(f"{gap}x{one.length}s")
                self._kinds.append((one.tag, one.vr))
                gap = 0
            else:
                gap += one.length
        self._fixed, self._wanted = struct.Struct("".join(fixed)), struct.Struct("".join(wanted))
        self._bytes = self._fixed.unpack_from(head)
        self._raw = self._wanted.unpack_from(head)
        tags = [tag for tag, _ in self._kinds]
        self._own = tags.index(POSITION) if POSITION in tags else len(tags)

    def read(self, head: bytes) -> Walked | None:
        """What a walk over a file would find; None where that has to be seen by the walk.

        Args:
            head: the first bytes of the file.
        """
        if len(head) < self._fixed.size or self._fixed.unpack_from(head) != self._bytes:
            return None
        raw, own = self._wanted.unpack_from(head), self._own
        try:
            if raw[:own] != self._raw[:own] or raw[own + 1 :] != self._raw[own + 1 :]:
                pairs = zip(self._kinds, raw, strict=True)
                values = {tag: value_of(vr, one) for (tag, vr), one in pairs}
                self._found, self._raw = self._found.with_values(values), raw
            if own == len(raw):
                return self._found
            return self._found.at(value_of(self._kinds[own][1], raw[own]))
        except Unusual:
            return None


class Layouts:
    """The layouts of the files of one folder, the last used first.

    Attributes:
        reach: how many bytes of a file `find` wants to see.
    """

    def __init__(self) -> None:
        self.reach = CHUNK
        self._kept: list[Layout] = []

    def find(self, head: bytes) -> tuple[Layout, Walked] | None:
        """What a walk over a file would find, and the layout that told; None where none does."""
        for place, layout in enumerate(self._kept):
            walked = layout.read(head)
            if walked is not None:
                self._kept.insert(0, self._kept.pop(place))
                return layout, walked
        return None

    def keep(self, stream: BinaryIO, start: int, syntax: Syntax, walked: Walked) -> None:
        """Learn the layout of a file that was walked over."""
        stream.seek(0)
        head = stream.read(walked.pixel_offset)
        if head[MARK : MARK + 4] != b"DICM":
            return
        try:
            layout = Layout(head, start, syntax, walked)
        except Unusual:
            return
        self._kept = [layout, *self._kept[: MOST_LAYOUTS - 1]]
        self.reach = max(self.reach, walked.pixel_offset)
