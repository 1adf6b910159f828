"""The pixels of a frame -> HU. Codecs are imagecodecs', whose decoders release the GIL.

A decoder believes the size that the compressed stream states, and some return what they have when
the stream ends early. So the size is compared with the header before anything is decoded, and a
stream without its end mark is refused.

Source: DICOM PS3.5 A.4 and annex G (RLE); ITU-T T.81 B.2.2, T.87 C.2.2 (frame headers); T.800
A.5.1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cdt_runtime.dicom_frame import Frame, PixelLayout
from cdt_runtime.dicom_header import PixelFile, inflate
from cdt_runtime.errors import MissingDependencyError, SeriesError

AIR_HU = -1024.0
"""What stands where nothing was measured, and the lowest value that a volume holds."""
TISSUE_HU = (-900.0, 3000.0)
"""A padding value inside this range would punch holes into the patient."""

Array = npt.NDArray[Any]

JPEG_END, J2K_START, J2K_END = b"\xff\xd9", b"\xff\x4f\xff\x51", b"\xff\xd9"


def _damaged(name: str, what: str) -> SeriesError:
    return SeriesError(f"{name}: {what}: copy the file again or export the series uncompressed")


def _jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components in the frame header of a JPEG or JPEG-LS stream."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", data, at + 5)
            return rows, columns, components
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _j2k_size(data: bytes) -> tuple[int, int, int] | None:
    """The same of a JPEG 2000 codestream, bare or in a JP2 box."""
    start = data.find(J2K_START, 0, 4096)
    if start < 0 or len(data) < start + 42:
        return None
    width, height, left, top = struct.unpack_from(">4I", data, start + 8)
    components = struct.unpack_from(">H", data, start + 40)[0]
    return height - top, width - left, components


def _check_stream(data: bytes, frame: Frame) -> None:
    """The stream's own size, and its end."""
    layout = frame.layout
    j2k = frame.file.syntax.codec == "JPEG 2000"
    size = _j2k_size(data) if j2k else _jpeg_size(data)
    if size is None:
        raise _damaged(frame.name, f"the {frame.file.syntax.codec} stream has no frame header")
    if size != (layout.rows, layout.columns, 1):
        raise _damaged(
            frame.name,
            f"the compressed image is {size[0]} x {size[1]} x {size[2]}, Rows x Columns say "
            f"{layout.rows} x {layout.columns} x 1",
        )
    if not data.rstrip(b"\0").endswith(J2K_END if j2k else JPEG_END):
        raise _damaged(frame.name, f"the {frame.file.syntax.codec} stream is cut short")


def _decode_rle(codecs: Any, data: bytes, layout: PixelLayout) -> Array:
    """One segment a byte plane, the highest byte first."""
    planes = layout.bits_allocated // 8
    count, *offsets = struct.unpack_from("<16I", data)
    bounds = [*offsets[:planes], len(data)]
    if count != planes or bounds[0] < 64 or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError("segments")
    size = layout.rows * layout.columns
    out = np.empty((size, planes), np.uint8)
    for plane in range(planes):
        segment = codecs.packbits_decode(data[bounds[plane] : bounds[plane + 1]])
        if len(segment) < size:
            raise ValueError("short segment")
        out[:, plane] = np.frombuffer(segment, np.uint8, size)
    return out.view(f">u{planes}").reshape(layout.rows, layout.columns)


def _decode(data: bytes, frame: Frame) -> Array:
    """Stored values of one compressed frame, as the codec gives them."""
    try:
        import imagecodecs as codecs
    except ImportError:
        raise MissingDependencyError(
            f"{frame.name}: compressed pixels need a decoder: pip install imagecodecs"
        ) from None
    codec = frame.file.syntax.codec
    if codec != "RLE":
        _check_stream(data, frame)
    try:
        if codec == "RLE":
            return _decode_rle(codecs, data, frame.layout)
        decoders: dict[str, Callable[[bytes], Any]] = {
            "JPEG": codecs.jpeg8_decode,
            "JPEG lossless": codecs.jpeg8_decode,  # ljpeg_decode crashes on damaged streams
            "JPEG-LS": codecs.jpegls_decode,
            "JPEG 2000": codecs.jpeg2k_decode,
        }
        return np.asarray(decoders[codec](data))
    except Exception:  # any kind: each codec has error classes of its own
        raise _damaged(frame.name, f"the {codec} pixels can't be decoded") from None


def _stored(cells: Array, layout: PixelLayout) -> Array:
    """Cells of the file -> stored values: unused bits off, sign from the highest stored bit.

    A JPEG 2000 stream may call its values unsigned where the header calls them signed; the bits
    are the same, so the header decides.
    """
    unused = layout.bits_allocated - layout.bits_stored
    if layout.signed:
        signed = cells.view(f"i{cells.itemsize}")
        return (signed << unused) >> unused if unused else signed
    return cells & ((1 << layout.bits_stored) - 1) if unused else cells


def _padding_mask(cells: Array, stored: Array, frame: Frame) -> Array | None:
    """True where nothing was measured; None where no value says so."""
    if frame.padding is None or padding_in_tissue(frame):
        return None
    low, high = frame.padding
    layout = frame.layout
    top = 1 << (layout.bits_stored - layout.signed)
    # -2000 is a habit even where 12 bits are stored, which it does not fit.
    fits = (-top if layout.signed else 0) <= low and high < top
    values = stored if fits else cells.view(f"{'iu'[not layout.signed]}{cells.itemsize}")
    return values == low if low == high else (values >= low) & (values <= high)


def padding_in_tissue(frame: Frame) -> bool:
    """Whether masking PixelPaddingValue would punch holes into the patient."""
    if frame.padding is None:
        return False
    ends = [value * frame.rescale.slope + frame.rescale.intercept for value in frame.padding]
    return min(ends) < TISSUE_HU[1] and max(ends) > TISSUE_HU[0]


def open_raw(file: PixelFile) -> BinaryIO:
    """Opens a file that was scanned before.

    Raises:
        SeriesError: the file is gone or not the one that was scanned.
    """
    try:
        stream = file.path.open("rb")
    except OSError:
        raise SeriesError(f"{file.name}: the file can't be opened any more: run again") from None
    stat = os.fstat(stream.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        stream.close()
        raise SeriesError(f"{file.name}: the file changed while it was read: run again")
    return stream


def _open_pixels(file: PixelFile) -> BinaryIO:
    """As `open_raw`, but a deflated file comes inflated."""
    stream = open_raw(file)
    if not file.syntax.deflated:
        return stream
    with stream:
        stream.seek(file.data_start)
        return inflate(stream, file.name)


def payloads(file: PixelFile, layout: PixelLayout) -> Iterator[bytes]:
    """The bytes of each frame as they are stored, compressed or not; call it inside `quiet`."""
    with _open_pixels(file) as stream:
        stream.seek(file.offset)
        if not file.syntax.codec:
            for _ in range(layout.frames):
                yield stream.read(layout.frame_bytes)
            return
        yield from _fragments(stream.read(), file, layout.frames)


def _fragments(data: bytes, file: PixelFile, frames: int) -> list[bytes]:
    from pydicom.encaps import generate_frames

    try:
        found = list(generate_frames(data, number_of_frames=frames))
    except Exception:  # any kind: the bytes can be anything
        raise _damaged(file.name, "the compressed pixels are not in frames") from None
    if len(found) != frames:
        raise _damaged(file.name, f"{len(found)} compressed frames, NumberOfFrames says {frames}")
    return found


def frame_hu(payload: bytes, frame: Frame) -> npt.NDArray[np.float32]:
    """One frame in HU.

    Args:
        payload: its bytes, from `payloads`.
        frame: its header.

    Returns:
        `(rows, columns)` float32; padding and everything below air are -1024.

    Raises:
        SeriesError: the pixels are damaged or cut short.
    """
    layout, native = frame.layout, not frame.file.syntax.codec
    if native and len(payload) < layout.frame_bytes:
        raise _damaged(frame.name, "the pixels are cut short")
    order = "<" if frame.file.syntax.little_endian else ">"
    width = layout.bits_allocated // 8
    cells = np.frombuffer(payload, f"{order}u{width}") if native else _decode(payload, frame)
    # The cast brings a codec's own type to the header's width and turns the byte order.
    cells = cells.reshape(layout.rows, layout.columns).astype(f"u{width}", copy=False)
    if native and layout.high_bit + 1 > layout.bits_stored:
        cells = cells >> (layout.high_bit + 1 - layout.bits_stored)
    stored = _stored(cells, layout)
    # float32 holds 24 bits exactly; wider values are scaled in float64.
    hu: Array = stored.astype(np.float32 if layout.bits_stored <= 24 else np.float64)
    np.multiply(hu, frame.rescale.slope, out=hu)
    np.add(hu, frame.rescale.intercept, out=hu)
    mask = _padding_mask(cells, stored, frame)
    if mask is not None:
        hu[mask] = AIR_HU
    clamped: npt.NDArray[np.float32] = np.maximum(hu, AIR_HU, out=hu).astype(np.float32, copy=False)
    return clamped
