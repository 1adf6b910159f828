"""One TIFF page: what its tags say, checked against the limits, and its pixels.

Segments (strips and tiles) go to `imagecodecs` one by one, each only after its place in the file
and its size are known, and each must fill its part of the image: nothing is ever padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cdt_runtime.codestream import jpeg2000_head, jpeg_head, webp_size
from cdt_runtime.errors import TileError
from cdt_runtime.tiff_ifd import Ifd
from cdt_runtime.tile_limits import check_bytes, check_filled, check_pixels

MAX_SEGMENTS = 100_000
"""Strips or tiles of one tile file."""

MAX_SLIDE_SEGMENTS = 1_000_000
MAX_SEGMENT_PIXELS = 16 * 2**20
"""Pixels of one segment of a slide, all in memory at once."""

COMPRESSIONS = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34925: "LZMA",
    34927: "WebP",
    50000: "Zstandard",
    50001: "WebP",
}
IMAGE_CODECS = ("JPEG", "JPEG 2000", "WebP")

_DTYPES = {
    (1, 8): "u1",
    (1, 16): "u2",
    (1, 32): "u4",
    (2, 16): "i2",
    (3, 16): "f2",
    (3, 32): "f4",
    (3, 64): "f8",
}
_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 4: "undefined", 5: "complex", 6: "complex"}


@dataclass(frozen=True)
class Page:
    """The tags of one page that decide how its pixels are read.

    `segment` is the (height, width) of a tile, or of a strip (the full width).
    """

    ifd: Ifd
    height: int
    width: int
    samples: int
    bits: int
    sample_format: int
    photometric: int
    compression: str
    planar: bool
    predictor: int
    fill_order: int
    segment: tuple[int, int]
    tiled: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type, native byte order, that a sample is decoded to."""
        if self.sample_format == 1 and self.bits < 16:
            return np.dtype("u1" if self.bits <= 8 else "u2")
        return np.dtype(_DTYPES[self.sample_format, self.bits])

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded page."""
        return self.height * self.width * self.samples * -(-self.bits // 8)

    @cached_property
    def jpeg_tables(self) -> bytes | None:
        """What the JPEG streams of all segments have in common."""
        if self.ifd.count(347) > 2**16:
            raise TileError("has JPEG tables of more than 64 KiB: damaged; write the file again")
        return self.ifd.data(347) or None

    @property
    def kind(self) -> tuple[int, ...]:
        """What pages of one image have in common."""
        return (self.height, self.width, self.samples, self.bits, self.sample_format)


def parse_page(ifd: Ifd, *, slide: bool = False) -> Page:
    """Read and check the tags of a page; segments are not read yet.

    Args:
        ifd: The page.
        slide: It is read in parts: only its segments must fit, not the whole.

    Raises:
        TileError: A tag is missing or damaged, the page is too large, or of a kind not read.
    """
    height, width = ifd.one(257), ifd.one(256)
    if slide:
        check_filled(height, width)
    else:
        check_pixels(height, width)
    samples = ifd.one(277, 1)
    if not 1 <= samples <= 1024:
        raise TileError(f"TIFF tag SamplesPerPixel is {samples}, expected 1 to 1024: damaged")
    if ifd.one(32997, 1) != 1:
        raise TileError("is a volume (ImageDepth > 1), not a tile: export one plane")
    page = Page(
        ifd=ifd,
        height=height,
        width=width,
        samples=samples,
        bits=ifd.same(258, 1),
        sample_format=ifd.same(339, 1),
        photometric=ifd.one(262, 1),
        compression=_compression(ifd),
        planar=ifd.one(284, 1) == 2 and samples > 1,
        predictor=ifd.one(317, 1),
        fill_order=ifd.one(266, 1),
        segment=_segment_size(ifd, height, width),
        tiled=322 in ifd,
    )
    if slide:
        _check_segment(page)
    else:
        check_bytes(page.nbytes)
    return page


def _check_segment(page: Page) -> None:
    height, width = page.segment
    if height * width > MAX_SEGMENT_PIXELS:
        raise TileError(
            f"is stored in pieces of {width} x {height} pixels, expected "
            f"{MAX_SEGMENT_PIXELS // 2**20} Mpixel or fewer: save it as a tiled pyramid"
        )


def _compression(ifd: Ifd) -> str:
    code = ifd.one(259, 1)
    if code not in COMPRESSIONS:
        read = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise TileError(f"TIFF compression {code} is not read (read: {read}): save it as one")
    return COMPRESSIONS[code]


def _segment_size(ifd: Ifd, height: int, width: int) -> tuple[int, int]:
    if 322 in ifd:
        size = ifd.one(323), ifd.one(322)
        check_pixels(*size)
        return size
    return min(max(ifd.one(278, height), 1), height), width


def check_samples(page: Page) -> None:
    """Refuse sample types that have no meaning as intensities, and codecs that can't hold them."""
    kind = _FORMATS.get(page.sample_format, f"format {page.sample_format}")
    packed = page.sample_format == 1 and page.bits in (1, 2, 4, 10, 12, 14)
    if not packed and (page.sample_format, page.bits) not in _DTYPES:
        raise TileError(
            f"holds {page.bits}-bit {kind} samples; expected unsigned 8, 16 or 32 bits, "
            "signed 16 bits or float: convert it"
        )
    if page.compression in IMAGE_CODECS and page.sample_format != 1:
        raise TileError(f"{page.compression} with {kind} samples is not read: save it as deflate")
    if page.compression in ("JPEG", "WebP") and page.bits != 8:
        raise TileError(f"{page.bits}-bit {page.compression} is not read: save it as deflate")
    if packed and page.predictor != 1:
        raise TileError(f"a predictor over {page.bits}-bit samples is not read: save it without")
    if page.predictor not in (1, 2) and (page.predictor, page.sample_format) != (3, 3):
        raise TileError(f"TIFF predictor {page.predictor} on {kind} samples is not read")


def read_page(page: Page) -> np.ndarray:
    """Decode a page.

    Returns:
        `(H, W, samples)`, native byte order; JPEG YCbCr is already RGB.

    Raises:
        TileError: A segment is missing, truncated or does not decode to its full size.
    """
    image = np.empty((page.height, page.width, page.samples), page.dtype)
    for (plane, top, left), span in zip(_segment_places(page), segment_spans(page), strict=True):
        part = decode_segment(page, top, left, read_segment(page, top, left, span))
        rows, columns, samples = part.shape
        image[top : top + rows, left : left + columns, plane : plane + samples] = part
    return image


def segment_shape(page: Page, top: int, left: int) -> tuple[int, int, int]:
    """(rows, columns, samples) of the segment at a place: at the edges those within the image."""
    rows, columns = min(page.segment[0], page.height - top), min(page.segment[1], page.width - left)
    return rows, columns, 1 if page.planar else page.samples


def read_segment(page: Page, top: int, left: int, span: tuple[int, int]) -> bytes:
    """The stored bytes of a segment, from its place in the image and its (offset, bytes)."""
    offset, count = span
    need = segment_shape(page, top, left)
    return page.ifd.source.read(offset, _stored(page, need, count), _name(top, left))


def decode_segment(page: Page, top: int, left: int, data: bytes) -> np.ndarray:
    """The pixels of a segment, as `segment_shape` says; safe in several threads."""
    need = segment_shape(page, top, left)
    return _decode(page, data, need, _name(top, left))[: need[0], : need[1]]


def _name(top: int, left: int) -> str:
    return f"image segment at row {top}, column {left}"


def _segment_places(page: Page) -> Iterator[tuple[int, int, int]]:
    """(first sample, top row, left column) of each segment in file order."""
    for plane in range(page.samples if page.planar else 1):
        for top in range(0, page.height, page.segment[0]):
            for left in range(0, page.width, page.segment[1]):
                yield plane, top, left


def segment_spans(page: Page, *, slide: bool = False) -> list[tuple[int, int]]:
    """(offset, bytes) of each segment; as many as the image size asks for.

    Args:
        page: Any page.
        slide: Far more are allowed, and a segment may be empty: scanners leave out bare glass.
    """
    tile_h, tile_w = page.segment
    most = MAX_SLIDE_SEGMENTS if slide else MAX_SEGMENTS
    expected = -(-page.height // tile_h) * -(-page.width // tile_w)
    expected *= page.samples if page.planar else 1
    if expected > most:
        raise TileError(
            f"is cut into {expected} segments of {tile_w} x {tile_h} pixels, over the limit of "
            f"{most}: save it with larger ones"
        )
    tags = (324, 325) if page.tiled else (273, 279)
    listed = [page.ifd.count(tag) for tag in tags]
    if listed != [expected, expected]:
        raise TileError(
            f"lists {listed[0]} segment offsets and {listed[1]} sizes where the image needs "
            f"{expected}: the file is damaged; write it again"
        )
    offsets, counts = (page.ifd.ints(tag, most) for tag in tags)
    if not slide and (0 in offsets or 0 in counts):
        raise TileError("has segments without data (sparse): they are not filled with zeros")
    _check_counts(page, max(counts))
    return list(zip(offsets, counts, strict=True))


def _check_counts(page: Page, largest: int) -> None:
    """Refuse segments far larger than their pixels: many of them could share one block of bytes."""
    pixels = page.segment[0] * page.segment[1] * -(-page.bits // 8)
    limit = 2 * pixels * (1 if page.planar else page.samples) + 2**16
    if largest > limit and page.compression != "none":
        raise TileError(
            f"has a compressed segment of {largest} bytes for {limit} bytes of pixels: damaged"
        )


def _stored(page: Page, need: tuple[int, int, int], count: int) -> int:
    """How many bytes of a segment to read: of plain samples no more than there are pixels."""
    if page.compression != "none":
        return count
    rows = page.segment[0] if page.tiled else need[0]
    return min(count, rows * -(-page.segment[1] * need[2] * page.bits // 8))


def _decode(page: Page, data: bytes, need: tuple[int, int, int], what: str) -> np.ndarray:
    """One segment as `(rows, columns, samples)`, at least as large as `need`."""
    try:
        if page.compression in IMAGE_CODECS:
            part = _decode_image(page, data, need)
        else:
            part = _decode_bytes(page, data, need)
    except TileError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise TileError(
            f"{what} does not decode as {page.compression} ({reason}): damaged"
        ) from error
    if part.ndim != 3 or part.dtype != page.dtype or any(np.less(part.shape, need)):
        raise TileError(
            f"{what} decodes to {part.dtype} {part.shape}, expected {page.dtype} {need}: damaged"
        )
    return part


def _decode_image(page: Page, data: bytes, need: tuple[int, int, int]) -> np.ndarray:
    """A segment that is an image of its own, whose header must agree before it is decoded."""
    import imagecodecs

    limit = 4 * page.segment[0] * page.segment[1] + 4096  # encoders may pad to whole blocks
    height, width = _stream_size(page, data)
    if height < need[0] or width < need[1] or height * width > limit:
        raise TileError(
            f"a {page.compression} segment of {width} x {height} pixels stands where "
            f"{need[1]} x {need[0]} are expected: damaged"
        )
    if page.compression == "JPEG":
        image = _decode_jpeg(page, data)
    elif page.compression == "WebP":
        image = imagecodecs.webp_decode(data)
    else:
        image = imagecodecs.jpeg2k_decode(data)
    image = image.reshape(image.shape[0], image.shape[1], -1)
    if image.shape[2] != need[2]:
        raise TileError(f"a segment has {image.shape[2]} samples, expected {need[2]}: damaged")
    return np.asarray(image)


def _stream_size(page: Page, data: bytes) -> tuple[int, int]:
    """(height, width) that the segment announces.

    libjpeg fills what is missing with gray and only warns, hence the test for the end marker.
    """
    if page.compression == "WebP":
        return webp_size(data)
    head = jpeg_head(data) if page.compression == "JPEG" else jpeg2000_head(data)
    if not head.end:
        raise TileError(
            f"a {page.compression} segment ends before its end marker: truncated; fetch it again"
        )
    return head.height, head.width


def _decode_jpeg(page: Page, data: bytes) -> np.ndarray:
    """JPEG to RGB or gray."""
    import imagecodecs

    source = target = None
    if page.planar:
        target = 1
    elif page.photometric == 6:
        target = 2
    elif page.photometric == 2:
        # Aperio stores RGB without a colour transform, and without the JFIF mark that implies one.
        source = None if data[6:10] == b"JFIF" else 2
        target = 2
    return np.asarray(
        imagecodecs.jpeg8_decode(
            data, tables=page.jpeg_tables, colorspace=source, outcolorspace=target
        )
    )


def _decode_bytes(page: Page, data: bytes, need: tuple[int, int, int]) -> np.ndarray:
    """A segment of plain samples, compressed or not."""
    import imagecodecs

    tile_h, tile_w = page.segment
    rows = tile_h if page.tiled else need[0]
    run = tile_w * need[2]
    row_bytes = -(-run * page.bits // 8)
    if page.fill_order == 2:
        data = bytes(imagecodecs.bitorder_decode(data))
    raw = _decompressor(page.compression)(data, tile_h * row_bytes)
    if len(raw) < rows * row_bytes:
        raise TileError(
            f"a segment holds {len(raw)} bytes of pixels, expected {rows * row_bytes}: truncated; "
            "fetch it again"
        )
    flat = _unpack(page, raw[: rows * row_bytes], run)
    return _unpredict(page, flat.reshape(rows, tile_w, need[2]))


def _decompressor(name: str) -> Callable[[bytes, int], bytes]:
    """`(data, limit) -> bytes`: never more than `limit` bytes come out."""
    import imagecodecs

    decode = {
        "LZW": imagecodecs.lzw_decode,
        "deflate": imagecodecs.zlib_decode,
        "PackBits": imagecodecs.packbits_decode,
        "LZMA": imagecodecs.lzma_decode,
        "Zstandard": imagecodecs.zstd_decode,
    }.get(name)
    if decode is None:
        return lambda data, limit: data[:limit]
    return lambda data, limit: bytes(decode(data, out=limit))


def _unpack(page: Page, raw: bytes, run: int) -> np.ndarray:
    import imagecodecs

    if page.bits in (8, 16, 32, 64):
        # the floating-point predictor shuffles bytes: it takes them as they lie
        order = "=" if page.predictor == 3 else page.ifd.source.order
        stored = np.frombuffer(raw, page.dtype.newbyteorder(order))  # type: ignore[arg-type]
        return stored.astype(page.dtype)
    return np.asarray(imagecodecs.packints_decode(raw, page.dtype, page.bits, runlen=run))


def _unpredict(page: Page, samples: np.ndarray) -> np.ndarray:
    import imagecodecs

    if page.predictor == 2:
        return np.asarray(imagecodecs.delta_decode(samples, axis=-2))
    if page.predictor == 3:
        return np.asarray(imagecodecs.floatpred_decode(samples, axis=-2))
    return samples
