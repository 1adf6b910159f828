"""The limits of a tile, and the sizes that compressed streams announce before they are decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cdt_runtime.errors import TileError

MAX_PIXELS = 64 * 2**20
"""Pixels (height x width) of one tile; anything larger is a slide."""

MAX_BYTES = 2**30
"""Decoded bytes of one tile, all channels together."""


def check_pixels(height: int, width: int) -> None:
    """Refuse an image that is empty or over the pixel limit."""
    if height < 1 or width < 1:
        raise TileError(f"is {width} x {height} pixels: there is no image in it")
    if height * width > MAX_PIXELS:
        raise TileError(
            f"is {width} x {height} pixels, over the limit of {MAX_PIXELS // 2**20} Mpixel a tile: "
            "read it as a slide (--slide), or crop a tile"
        )


def check_bytes(count: int) -> None:
    """Refuse an image whose decoded pixels would not fit."""
    if count > MAX_BYTES:
        raise TileError(
            f"decodes to {count / 2**20:.0f} MiB, over the limit of {MAX_BYTES // 2**20} MiB a "
            "tile: crop a tile, or keep fewer channels"
        )


@dataclass(frozen=True)
class JpegFrame:
    """What a JPEG stream announces: size in pixels, bits, components, and where it ends.

    `end` is the offset of the last end marker behind the first scan, -1 where there is none.
    """

    height: int
    width: int
    bits: int
    components: int
    end: int


def jpeg_frame(data: bytes) -> JpegFrame:
    """Walk the JPEG markers up to the first scan.

    Raises:
        TileError: The markers are damaged or no frame header comes before the first scan.

    Source: ITU-T T.81, annex B.
    """
    at, frame = 2, None
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 10 <= len(data):
            frame = struct.unpack_from(">BHHB", data, at + 4)
        if marker == 0xDA and frame:
            bits, height, width, components = frame
            return JpegFrame(height, width, bits, components, data.find(b"\xff\xd9", at))
        at += 2 + length
    raise TileError("a JPEG stream has no frame before its pixels: damaged; fetch it again")


def stream_size(data: bytes, compression: str) -> tuple[int, int]:
    """(height, width) that the header of a JPEG, JPEG 2000 or WebP stream announces."""
    if compression == "JPEG":
        frame = jpeg_frame(data)
        return frame.height, frame.width
    if compression == "WebP":
        return _webp_size(data)
    return _jpeg2000_size(data)


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    """Source: ITU-T T.800, annex A.5.1 (SIZ marker)."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or at + 24 > len(data):
        raise TileError("a JPEG 2000 stream has no size marker: damaged; fetch it again")
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    return bottom - top, right - left


def _webp_size(data: bytes) -> tuple[int, int]:
    """Source: RFC 9649, sections 2.5 to 2.7; the first chunk tells the size."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise TileError("a WebP stream has no header: damaged; fetch it again")
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return height, width
    if data[12:16] == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF
