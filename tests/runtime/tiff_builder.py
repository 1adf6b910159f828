"""TIFF files built tag by tag, for tests: whatever a writer would refuse to write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

BYTE, ASCII, SHORT, LONG, RATIONAL = 1, 2, 3, 4, 5
_CODES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", RATIONAL: "I"}

Tags = Mapping[int, tuple[int, Sequence[int]]]


def gray(height: int, width: int, data: bytes, **changes: tuple[int, Sequence[int]]) -> dict:
    """The tags of an 8-bit gray page in one strip; `t258=(SHORT, [16])` changes a tag."""
    tags = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [8]),
        259: (SHORT, [1]),
        262: (SHORT, [1]),
        277: (SHORT, [1]),
        278: (LONG, [height]),
    }
    tags.update({int(name[1:]): value for name, value in changes.items()})
    return {"tags": tags, "data": [data]}


def build(*pages: dict, order: str = "<", loop: bool = False) -> bytes:
    """A classic TIFF; with `loop` the last page points back at the first."""
    body = bytearray(b"II*\0" if order == "<" else b"MM\0*")
    body += struct.pack(f"{order}I", 8)
    for page in pages:
        start = len(body)
        tags = dict(page["tags"])
        segments = page["data"]
        offset_tag = 324 if 322 in tags else 273
        tags.setdefault(offset_tag, (LONG, [0] * len(segments)))
        tags.setdefault(offset_tag + (1 if 322 in tags else 6), (LONG, [*map(len, segments)]))
        end = start + 2 + 12 * len(tags) + 4
        sizes = {tag: struct.calcsize(_CODES[kind]) * len(v) for tag, (kind, v) in tags.items()}
        data_at = end + sum(size for size in sizes.values() if size > 4)
        offsets = [data_at + sum(map(len, segments[:i])) for i in range(len(segments))]
        if tags[offset_tag][1] == [0] * len(segments) and not page.get("sparse"):
            tags[offset_tag] = (LONG, offsets)
        table, values = b"", b""
        for tag, (kind, numbers) in sorted(tags.items()):
            raw = struct.pack(f"{order}{len(numbers)}{_CODES[kind]}", *numbers)
            count = len(numbers) // 2 if kind == RATIONAL else len(numbers)
            table += struct.pack(f"{order}HHI", tag, kind, count)
            table += (
                raw.ljust(4, b"\0")
                if len(raw) <= 4
                else struct.pack(f"{order}I", end + len(values))
            )
            values += raw if len(raw) > 4 else b""
        blob = b"".join(segments)
        after = end + len(values) + len(blob)
        last = page is pages[-1]
        following = (8 if loop else 0) if last else after
        body += struct.pack(f"{order}H", len(tags)) + table + struct.pack(f"{order}I", following)
        body += values + blob
    return bytes(body)
