"""PNG and JPEG to a raster. The size is read from the header before a decoder is called."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from cdt_runtime.codestream import jpeg_head
from cdt_runtime.errors import TileError
from cdt_runtime.raster import Raster, drop_alpha, plausible_mpp, turn
from cdt_runtime.tile_limits import check_bytes, check_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112
_PNG_SAMPLES = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""PNG colour type -> samples a pixel once a palette is expanded."""

_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
"""(first row, first column, row step, column step) of the seven passes of an interlaced PNG."""


def read_png(data: bytes) -> Raster:
    """Decode a PNG: gray, RGB, palette (expanded) or an opaque alpha (dropped), 8 or 16 bits.

    Raises:
        TileError: The file is damaged, too large, bilevel, animated or transparent.
    """
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise TileError("is a PNG without a header: truncated; fetch it again")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    check_pixels(height, width)
    if colour not in _PNG_SAMPLES:
        raise TileError(f"has the PNG colour type {colour}, expected 0, 2, 3, 4 or 6: damaged")
    check_bytes(height * width * _PNG_SAMPLES[colour] * max(depth // 8, 1))
    if depth == 1 and colour == 0:
        raise TileError("is bilevel (1 bit a sample), expected 8 bits or more: save it as gray")
    chunks = _png_chunks(data)
    if b"acTL" in chunks:
        raise TileError("is an animated PNG, expected one image: export one frame")
    bits = depth * (1 if colour == 3 else _PNG_SAMPLES[colour])
    _check_rows(chunks.get(b"IDAT", []), _png_bytes(height, width, bits, interlaced=data[28] == 1))
    with _opened(data, "PNG") as image:
        if depth == 16 and "transparency" in image.info:
            raise TileError("has one transparent colour in 16 bits: flatten the image")
        pixels = _png16(data) if depth == 16 else _pixels(image)
        return _raster(image, pixels, 16 if depth == 16 else 8)


def _png_chunks(data: bytes) -> dict[bytes, list[bytes]]:
    """The chunks up to the end mark by name, each with a right checksum.

    libpng and Pillow let some damaged pixels pass with a warning.

    Source: ISO/IEC 15948, section 5.3.
    """
    at, chunks = 8, dict[bytes, list[bytes]]()
    while b"IEND" not in chunks:
        if at + 12 > len(data):
            raise TileError("ends before its end mark: truncated; fetch it again")
        (size,) = struct.unpack_from(">I", data, at)
        name, body_end = data[at + 4 : at + 8], at + 8 + size
        if body_end + 4 > len(data):
            raise TileError("ends before its end mark: truncated; fetch it again")
        if zlib.crc32(data[at + 4 : body_end]) != int.from_bytes(data[body_end : body_end + 4]):
            raise TileError(f"has a wrong checksum in its {name!r} chunk: damaged; fetch it again")
        chunks.setdefault(name, []).append(data[at + 8 : body_end])
        at = body_end + 4
    return chunks


def _png_bytes(height: int, width: int, bits: int, *, interlaced: bool) -> int:
    """Bytes of all rows before compression, one filter byte a row; `bits` a pixel."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for top, left, down, across in passes:
        rows, columns = -(-(height - top) // down), -(-(width - left) // across)
        if rows > 0 and columns > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total


def _check_rows(parts: list[bytes], expected: int) -> None:
    """Refuse a PNG whose rows end early: Pillow leaves the missing ones black without a word."""
    inflater, count = zlib.decompressobj(), 0
    with _damage_named("PNG"):
        for part in parts:
            while part and count < expected:
                count += len(inflater.decompress(part, 2**20))
                part = inflater.unconsumed_tail
    if count < expected:
        raise TileError(f"holds {count} of {expected} bytes of rows: damaged; fetch it again")


def read_jpeg(data: bytes) -> Raster:
    """Decode a JPEG: gray, or YCbCr and RGB to RGB, 8 bits.

    Raises:
        TileError: The file is damaged, too large, CMYK or of 12 bits.
    """
    with _damage_named("JPEG"):
        frame = jpeg_head(data)
    check_pixels(frame.height, frame.width)
    if frame.bits != 8 or frame.components not in (1, 3):
        kind = "CMYK" if frame.components == 4 else f"{frame.components} components"
        raise TileError(
            f"is a JPEG of {kind}, {frame.bits} bits; expected gray or RGB of 8: convert it"
        )
    if not frame.end:
        raise TileError("ends before its end mark: truncated; fetch it again")
    with _opened(data, "JPEG") as image:
        return _raster(image, _pixels(image), 8)


def _opened(data: bytes, kind: str) -> Image:
    """A Pillow image, fully decoded."""
    from PIL import Image

    with _damage_named(kind):
        image = Image.open(io.BytesIO(data), formats=[kind])
        image.load()
    return image


@contextmanager
def _damage_named(kind: str) -> Iterator[None]:
    """Whatever a decoder raises becomes one line; decoders raise nearly everything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:120].replace("<_io.BytesIO object", "it")
        raise TileError(f"does not decode as {kind} ({reason}): damaged; fetch it again") from error


def _pixels(image: Image) -> np.ndarray:
    """`(H, W, C)` uint8; gray palettes and packed gray are expanded by Pillow."""
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise TileError(f"has the Pillow mode {image.mode}, expected gray or RGB: convert it")
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def _png16(data: bytes) -> np.ndarray:
    """`(H, W, C)` uint16; Pillow would cut 16-bit colours to 8."""
    import imagecodecs

    with _damage_named("PNG"):
        pixels = np.asarray(imagecodecs.png_decode(data))
    return pixels.reshape(*pixels.shape[:2], -1)


def _raster(image: Image, pixels: np.ndarray, bits: int) -> Raster:
    notes: tuple[str, ...] = ()
    if pixels.shape[2] in (2, 4):
        pixels = drop_alpha(pixels, bits)
        notes = ("opaque alpha dropped",)
    mpp, more = _mpp(image)
    return Raster(
        pixels=turn(pixels, _orientation(image)),
        names=("gray",) if pixels.shape[2] == 1 else ("R", "G", "B"),
        bits=bits,
        mpp=mpp,
        warnings=notes + more,
    )


def _orientation(image: Image) -> int:
    """EXIF Orientation; 1 where there is none or the EXIF can't be parsed."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        raise TileError(f"has damaged EXIF data ({type(error).__name__}): save it again") from error
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _mpp(image: Image) -> tuple[float | None, tuple[str, ...]]:
    try:
        across, down = (float(value) for value in image.info.get("dpi", (0, 0)))
    except (TypeError, ValueError, ZeroDivisionError):
        return None, ()
    if not (across > 0 and down > 0):
        return None, ()
    return plausible_mpp(25_400.0 / across, 25_400.0 / down)
