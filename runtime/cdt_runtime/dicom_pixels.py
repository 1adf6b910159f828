"""The pixels of a frame -> HU. Codecs are imagecodecs', whose decoders release the GIL.

The size that a compressed stream states is compared with the header before anything is decoded,
and a stream without its end mark is refused (see `codestream`).

Source: DICOM PS3.5 A.4 (fragments) and annex G (RLE).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from io import FileIO
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cdt_runtime.codestream import CodestreamError, jpeg2000_head, jpeg_head
from cdt_runtime.dicom_frame import Frame, PixelLayout
from cdt_runtime.dicom_header import PixelFile, inflate, reading
from cdt_runtime.dicom_quiet import load_pydicom
from cdt_runtime.errors import MissingDependencyError, SeriesError
from cdt_runtime.printable import counted

AIR_HU = -1024.0
"""What stands where nothing was measured, and the lowest value that a volume holds."""
TISSUE_HU = (-900.0, 3000.0)
"""A padding value inside this range would punch holes into the patient."""

ITEM, LAST_ITEM = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
OFFSETS = (b"", bytes(4))
"""The first item of a single frame: where frames begin, if it says so."""

Array = npt.NDArray[Any]
Payload = bytes | bytearray | memoryview


def _damaged(name: str, what: str) -> SeriesError:
    return SeriesError(f"{name}: {what}: copy the file again or export the series uncompressed")


def _check_stream(data: bytes, frame: Frame) -> None:
    """The stream's own size, and its end."""
    layout, codec = frame.layout, frame.file.syntax.codec
    try:
        head = jpeg2000_head(data) if codec == "JPEG 2000" else jpeg_head(data)
    except CodestreamError as error:
        raise _damaged(frame.name, f"the {codec} stream has {error}") from None
    if (head.height, head.width, head.components) != (layout.rows, layout.columns, 1):
        raise _damaged(
            frame.name,
            f"the compressed image is {head.height} x {head.width} x {head.components}, "
            f"Rows x Columns say {layout.rows} x {layout.columns} x 1",
        )
    if not head.end or data[head.end :].strip(b"\0"):
        raise _damaged(frame.name, f"the {codec} stream is cut short")


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


def stored_of(cells: Array, layout: PixelLayout) -> Array:
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


def open_raw(file: PixelFile) -> FileIO:
    """Opens a file that was scanned before, without a buffer.

    Raises:
        SeriesError: the file is gone or not the one that was scanned.
    """
    try:
        stream = FileIO(file.path)
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


def is_raw(file: PixelFile) -> bool:
    """Whether the pixels lie in the file as they are, neither compressed nor deflated."""
    return not file.syntax.codec and not file.syntax.deflated


def read_raw(frame: Frame, room: memoryview) -> None:
    """Read the bytes of a frame of a raw file.

    Args:
        frame: its header.
        room: what they fill.

    Raises:
        SeriesError: the file is not the one that was scanned, or can't be read.
    """
    with reading(frame.file.name), open_raw(frame.file) as stream:
        stream.seek(frame.file.offset + frame.index * len(room))
        _fill(stream, room, frame.name)


def _fill(stream: BinaryIO | FileIO, room: memoryview, name: str) -> None:
    done = 0
    # A read may give less than was asked for before the file ends, as on some network disks.
    while done < len(room):
        count = stream.readinto(room[done:])  # type: ignore[union-attr]
        if not count:
            raise _damaged(name, "the pixels are cut short")
        done += count


def payloads(file: PixelFile, layout: PixelLayout) -> Iterator[Payload]:
    """The bytes of each frame as they are stored, compressed or not; call it inside `quiet`."""
    with reading(file.name), _open_pixels(file) as stream:
        stream.seek(file.offset)
        if not file.syntax.codec:
            for _ in range(layout.frames):
                frame = bytearray(layout.frame_bytes)
                _fill(stream, memoryview(frame), file.name)
                yield frame
            return
        yield from _fragments(stream.read(), file, layout.frames)


def _fragments(data: bytes, file: PixelFile, frames: int) -> list[bytes]:
    """Each compressed frame; how pydicom takes them apart counts where it is not plain."""
    only = _only_frame(data) if frames == 1 else None
    if only is not None:
        return [only]
    load_pydicom()
    from pydicom.encaps import generate_frames

    try:
        found = list(generate_frames(data, number_of_frames=frames))
    except Exception:  # any kind: the bytes can be anything
        raise _damaged(file.name, "the compressed pixels are not in frames") from None
    if len(found) != frames:
        count = counted(len(found), "compressed frame")
        raise _damaged(file.name, f"{count}, NumberOfFrames says {frames}")
    return found


def _only_frame(data: bytes) -> bytes | None:
    """The fragments of a single frame, joined; None where they are not written as most are."""
    place, items = 0, []
    while data[place : place + 4] == ITEM and place + 8 <= len(data):
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        items.append(data[place + 8 : end])
        place = end
    if data[place : place + 4] != LAST_ITEM or len(items) < 2 or items[0] not in OFFSETS:
        return None
    return b"".join(items[1:])


def hu_of(cells: Array, frame: Frame) -> npt.NDArray[np.float32]:
    """One frame in HU.

    Args:
        cells: what `cells_of` gave.
        frame: its header.

    Returns:
        `(rows, columns)` float32; padding and everything below air are -1024.
    """
    layout = frame.layout
    stored = stored_of(cells, layout)
    # float32 holds 24 bits exactly; wider values are scaled in float64.
    hu: Array = stored.astype(np.float32 if layout.bits_stored <= 24 else np.float64)
    np.multiply(hu, frame.rescale.slope, out=hu)
    np.add(hu, frame.rescale.intercept, out=hu)
    mask = _padding_mask(cells, stored, frame)
    if mask is not None:
        hu[mask] = AIR_HU
    clamped: npt.NDArray[np.float32] = np.maximum(hu, AIR_HU, out=hu).astype(np.float32, copy=False)
    return clamped


def cells_of(payload: Payload, frame: Frame, count: int = 1) -> Array:
    """What the file or the codec holds for a frame, in the header's width and this byte order.

    Args:
        payload: its bytes, from `payloads`.
        frame: its header.
        count: of frames like it, whose raw bytes follow each other.

    Returns:
        `(count * rows, columns)` unsigned integers.

    Raises:
        SeriesError: the pixels are damaged or cut short.
    """
    layout, native = frame.layout, not frame.file.syntax.codec
    order = "<" if frame.file.syntax.little_endian else ">"
    width = layout.bits_allocated // 8
    cells = np.frombuffer(payload, f"{order}u{width}") if native else _decode(bytes(payload), frame)
    # The cast brings a codec's own type to the header's width and turns the byte order.
    cells = cells.reshape(count * layout.rows, layout.columns).astype(f"u{width}", copy=False)
    if native and layout.high_bit + 1 > layout.bits_stored:
        cells = cells >> (layout.high_bit + 1 - layout.bits_stored)
    return cells
