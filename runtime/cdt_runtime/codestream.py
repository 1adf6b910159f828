"""What compressed images announce of themselves, read before any decoder sees a byte.

A decoder believes the size that a stream states, and some return what they have when it ends early.
Each reader compares the head with what its own file says and asks for the end mark.

Source: ITU-T T.81 annex B (JPEG), T.87 C.2.2 (JPEG-LS), T.800 A.5.1 (JPEG 2000), RFC 9649 (WebP).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

JPEG_START = b"\xff\xd8"
J2K_START = b"\xff\x4f\xff\x51"
END = b"\xff\xd9"
"""Of JPEG, JPEG-LS and JPEG 2000 alike; their coded bytes can't hold it."""
MAX_BOXES = 4096
"""Bytes in which a JPEG 2000 stream begins: boxes may come before it."""


class CodestreamError(ValueError):
    """A stream is damaged before its pixels begin; the reader of the file adds what and where."""


@dataclass(frozen=True)
class StreamHead:
    """What a JPEG, JPEG-LS or JPEG 2000 stream announces.

    `end` is the offset behind the end mark, 0 where the stream is cut short.
    """

    height: int
    width: int
    bits: int
    components: int
    end: int


def jpeg_head(data: bytes) -> StreamHead:
    """Walk the markers of a JPEG or JPEG-LS stream up to the first scan.

    Raises:
        CodestreamError: The markers are damaged or no frame header comes before the first scan.
    """
    at, frame = 2, None
    while data.startswith(JPEG_START) and at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if _is_frame(marker) and at + 10 <= len(data):
            frame = struct.unpack_from(">BHHB", data, at + 4)
        if marker == 0xDA and frame:
            bits, height, width, components = frame
            return StreamHead(height, width, bits, components, _end(data, at))
        if marker == END[1] or length < 2:
            break
        at += 2 + length
    raise CodestreamError("no frame header before its pixels")


def _is_frame(marker: int) -> bool:
    return marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))


def _end(data: bytes, start: int) -> int:
    at = data.find(END, start)
    return at + len(END) if at >= 0 else 0


def jpeg2000_head(data: bytes) -> StreamHead:
    """Read the size marker of a JPEG 2000 stream, bare or in a JP2 box.

    Raises:
        CodestreamError: It is missing, damaged or cut short.
    """
    start = data.find(J2K_START, 0, MAX_BOXES)
    if start < 0 or len(data) < start + 43:
        raise CodestreamError("no frame header")
    (length,) = struct.unpack_from(">H", data, start + 4)
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    components, depth = struct.unpack_from(">HB", data, start + 40)
    if length != 38 + 3 * components or right <= left or bottom <= top:
        raise CodestreamError("a damaged frame header")
    end = _end(data, start + 4 + length)
    return StreamHead(bottom - top, right - left, (depth & 0x7F) + 1, components, end)


def webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a WebP stream, which its first chunk tells.

    Raises:
        CodestreamError: The stream has no header.
    """
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise CodestreamError("no frame header")
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return height, width
    if data[12:16] == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF
