"""One DICOM file -> what its header says, checked. No pixel is decoded here.

An ordinary file is walked over (`dicom_walk`), any other parsed by pydicom; everything that is used
is then read through `Fields`, which turns a missing or bad value into one line that names the file
and the attribute, never the value: header text can hold a patient's name, and pydicom's own
warnings print it (see `dicom_quiet`).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cdt_runtime.dicom_walk import LONG_VRS, PIXEL_TAGS, Unusual, walk
from cdt_runtime.errors import SeriesError
from cdt_runtime.printable import reason

MAX_INFLATED = 512 << 20
"""Bytes that a deflated file may unpack to."""

HEAD_BYTES = 132
"""The preamble and the DICM mark."""

PIXEL_DATA = 0x7FE00010

EXPORT_AGAIN = "export the series again from the archive"


@dataclass(frozen=True)
class Syntax:
    """A transfer syntax: how the elements are written and which codec the pixels use."""

    implicit: bool = False
    little_endian: bool = True
    deflated: bool = False
    codec: str = ""
    """Empty for uncompressed pixels, else the family of the codec."""
    lossy: bool = False


SYNTAXES: dict[str, Syntax] = {
    "1.2.840.10008.1.2": Syntax(implicit=True),
    "1.2.840.10008.1.2.1": Syntax(),
    "1.2.840.10008.1.2.2": Syntax(little_endian=False),
    "1.2.840.10008.1.2.1.99": Syntax(deflated=True),
    "1.2.840.10008.1.2.5": Syntax(codec="RLE"),
    "1.2.840.10008.1.2.4.50": Syntax(codec="JPEG", lossy=True),
    "1.2.840.10008.1.2.4.51": Syntax(codec="JPEG", lossy=True),
    "1.2.840.10008.1.2.4.57": Syntax(codec="JPEG lossless"),
    "1.2.840.10008.1.2.4.70": Syntax(codec="JPEG lossless"),
    "1.2.840.10008.1.2.4.80": Syntax(codec="JPEG-LS"),
    "1.2.840.10008.1.2.4.81": Syntax(codec="JPEG-LS", lossy=True),
    "1.2.840.10008.1.2.4.90": Syntax(codec="JPEG 2000"),
    "1.2.840.10008.1.2.4.91": Syntax(codec="JPEG 2000", lossy=True),
}


@contextmanager
def reading(name: str, cure: str = "check its permissions, or copy it again") -> Iterator[None]:
    """Whatever the system says about a file becomes a SeriesError of one line."""
    try:
        yield
    except OSError as error:
        raise SeriesError(f"{name} can't be read ({reason(error)}): {cure}") from None


class Fields:
    """Checked access to the attributes of one file or of one frame in it.

    Args:
        name: how messages call the file or frame.
        sources: pydicom data sets; the first that holds an attribute wins.
    """

    def __init__(self, name: str, *sources: Any) -> None:
        self.name = name
        self._sources = sources

    def error(self, keyword: str, problem: str, cure: str = EXPORT_AGAIN) -> SeriesError:
        """The error for a bad attribute, ready to be raised."""
        return SeriesError(f"{self.name}: {keyword} {problem}: {cure}")

    def get(self, keyword: str) -> Any:
        """The value as pydicom gives it, or None where it is absent or empty."""
        for source in self._sources:
            try:
                value = source.get(keyword)
            except Exception:  # any kind: pydicom converts on access, from bytes of any content
                raise self.error(keyword, "can't be read") from None
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                return value
        return None

    def need(self, keyword: str) -> Any:
        """As `get`, but an absent value is an error."""
        value = self.get(keyword)
        if value is None:
            raise self.error(keyword, "is missing, a CT slice needs it")
        return value

    def text(self, keyword: str) -> str:
        """The value as text, empty where it is absent."""
        value = self.get(keyword)
        return "" if value is None else str(value).strip()

    def words(self, keyword: str) -> frozenset[str]:
        """The values of a multi-valued code string, in capitals."""
        value = self.get(keyword)
        values = [value] if value is None or isinstance(value, str) else list(value)
        return frozenset(str(v).strip().upper() for v in values if v is not None)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...]:
        """Exactly `count` finite numbers."""
        value = self.need(keyword)
        values = [value] if isinstance(value, str | int | float) else value
        try:
            numbers = tuple(float(v) for v in values)
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise self.error(keyword, f"is not {count} finite number{'s' * (count > 1)}")
        return numbers

    def number(self, keyword: str) -> float | None:
        """One finite number, or None where it is absent."""
        return None if self.get(keyword) is None else self.numbers(keyword, 1)[0]

    def integer(self, keyword: str, default: int | None = None) -> int:
        """One whole number; the default stands in for an absent one."""
        if default is not None and self.get(keyword) is None:
            return default
        value = self.numbers(keyword, 1)[0]
        if value != int(value):
            raise self.error(keyword, "is not a whole number")
        return int(value)

    def items(self, keyword: str) -> list[Any]:
        """The items of a sequence, none where it is absent."""
        value = self.get(keyword)
        if value is None:
            return []
        if isinstance(value, str | bytes) or not all(hasattr(v, "get_item") for v in value):
            raise self.error(keyword, "is not a sequence")
        return list(value)

    def stored_value(self, keyword: str, signed: bool) -> int | None:
        """A 16-bit stored value, in the pixels' own sign.

        PixelPaddingValue is often written as the other of US and SS (63536 for -2000), so that
        only its bytes can be trusted.
        """
        value = self.get(keyword)
        if value is None:
            return None
        # Implicit VR leaves US or SS open, then pydicom hands out the two bytes.
        raw = isinstance(value, bytes) and len(value) == 2
        number = int.from_bytes(value, "little") if raw else self.integer(keyword)
        if not -(1 << 15) <= number < 1 << 16:
            raise self.error(keyword, "does not fit 16 bits")
        wrapped = number & 0xFFFF
        return wrapped - (1 << 16) if signed and wrapped >> 15 else wrapped


@dataclass(frozen=True)
class PixelFile:
    """Where the pixels of one file lie."""

    path: Path = field(repr=False)
    name: str
    size: int
    mtime_ns: int
    state: str
    """Changes whenever the file does: its place on the disk, size and times."""
    syntax: Syntax
    data_start: int
    """Byte at which the data set begins, after the file meta group."""
    offset: int
    """Byte of the pixel values: in the file, or in the inflated data set."""
    length: int
    """Bytes of the pixel values, or UNDEFINED_LENGTH where they are encapsulated."""


@dataclass(frozen=True, eq=False)
class Header:
    """One parsed DICOM file."""

    file: PixelFile
    data: Any = field(repr=False)
    pixel_tag: int | None

    @property
    def fields(self) -> Fields:
        """The top level of the data set."""
        return Fields(self.file.name, self.data)

    @property
    def is_directory(self) -> bool:
        """A DICOMDIR: a table of files, which is never followed."""
        return "DirectoryRecordSequence" in self.data

    def patient(self) -> dict[str, str]:
        """A digest for each attribute that tells the patient, where the file has it. Never shown.

        Names are told apart by their letters alone: writers differ in capitals and separators.
        """
        names = {
            "PatientID": self.fields.text("PatientID"),
            "PatientName": "".join(filter(str.isalnum, self.fields.text("PatientName").casefold())),
        }
        return {
            keyword: hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            for keyword, text in names.items()
            if text
        }


class _AtPixels:
    """Tells pydicom where to stop, and keeps what it saw there."""

    def __init__(self) -> None:
        self.tag: int | None = None
        self.header_bytes = 8
        self.length = 0

    def __call__(self, tag: int, vr: str | None, length: int) -> bool:
        if int(tag) not in PIXEL_TAGS:
            return False
        self.tag, self.length = int(tag), length
        self.header_bytes = 12 if (vr or "").encode("latin-1") in LONG_VRS else 8
        return True


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file with these first HEAD_BYTES is worth parsing: the DICM mark or a data set."""
    return _is_marked(head) or _is_data_set_start(head)


def _is_marked(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def _is_data_set_start(head: bytes) -> bool:
    """Whether the bytes open a data set that has no DICM mark: first a low 0002 or 0008 tag."""
    if len(head) < 8:
        return False
    if head[:2] in (b"\x08\x00", b"\x02\x00"):
        return head[3] == 0 and head[2] <= 0x18
    return head[:2] == b"\x00\x08" and head[2] == 0 and head[3] <= 0x18


def _read_meta(stream: BinaryIO, name: str) -> str | None:
    """Walks the file meta group (always explicit little endian); gives its TransferSyntaxUID."""
    uid = None
    while len(head := stream.read(8)) == 8:
        group, element, vr, length = struct.unpack("<HH2sH", head)
        if group != 2:
            stream.seek(-8, os.SEEK_CUR)
            return uid
        if vr in LONG_VRS:
            length = int.from_bytes(stream.read(4), "little")
        elif not vr.isalpha():
            raise SeriesError(f"{name}: the file meta group is damaged: {EXPORT_AGAIN}")
        value = stream.read(length) if element == 0x10 and length <= 64 else None
        if value is None:
            stream.seek(length, os.SEEK_CUR)
        else:
            uid = value.decode("ascii", "replace").rstrip("\0 ")
    return uid


def _guess_syntax(stream: BinaryIO) -> Syntax:
    """For files that name no transfer syntax: from the first element of the data set."""
    head = stream.read(8)
    stream.seek(-len(head), os.SEEK_CUR)
    return Syntax(implicit=not head[4:6].isalpha(), little_endian=head[:1] != b"\0")


def inflate(stream: BinaryIO, name: str) -> io.BytesIO:
    """Unpacks a deflated data set into memory, never more than MAX_INFLATED bytes of it."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(stream.read(), MAX_INFLATED + 1)
    except zlib.error:
        raise SeriesError(f"{name}: the deflated data is damaged: {EXPORT_AGAIN}") from None
    if len(data) > MAX_INFLATED:
        raise SeriesError(
            f"{name}: the deflated data unpacks to more than {MAX_INFLATED >> 20} MB, the limit: "
            "export the series without deflate"
        )
    if not unpacker.eof:
        raise SeriesError(f"{name}: the deflated data is cut short: copy the file again")
    return io.BytesIO(data)


def _data_set(
    stream: BinaryIO, start: int, size: int, syntax: Syntax, name: str
) -> tuple[Any, int | None, int, int]:
    """What holds the attributes; tag, first byte and length of the pixels."""
    if not syntax.implicit and syntax.little_endian and not syntax.deflated:
        try:
            found = walk(stream, start, size)
        except Unusual:
            stream.seek(start)
        else:
            return found, found.pixel_tag, found.pixel_offset, found.pixel_length
    source = inflate(stream, name) if syntax.deflated else stream
    data, stop = _parse(source, syntax, name)
    return data, stop.tag, source.tell() + stop.header_bytes, stop.length


def _parse(stream: BinaryIO, syntax: Syntax, name: str) -> tuple[Any, _AtPixels]:
    from pydicom.filereader import read_dataset

    stop = _AtPixels()
    try:
        data = read_dataset(stream, syntax.implicit, syntax.little_endian, stop_when=stop)
    except Exception:  # any kind: the parser fails in many ways on damaged bytes
        raise SeriesError(f"{name}: the header is damaged: {EXPORT_AGAIN}") from None
    return data, stop


def _syntax_of(uid: str | None, stream: BinaryIO, name: str) -> Syntax:
    if not uid:
        return _guess_syntax(stream)
    if uid not in SYNTAXES:
        shown = uid if set(uid) <= set("0123456789.") else "(not a UID)"
        raise SeriesError(
            f"{name}: transfer syntax {shown} is not supported: export the series as Explicit VR "
            "Little Endian"
        )
    return SYNTAXES[uid]


def read_header(path: Path, name: str) -> Header | None:
    """Parses one file up to its pixels; call it inside `quiet`.

    Args:
        path: the file.
        name: how messages call it.

    Returns:
        None where the file is not DICOM.

    Raises:
        SeriesError: the file bears the DICM mark and does not parse.
    """
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        if not looks_like_dicom(head):
            return None
        marked = _is_marked(head)
        stream.seek(HEAD_BYTES if marked else 0)
        uid = _read_meta(stream, name)
        syntax, start, stat = (
            _syntax_of(uid, stream, name),
            stream.tell(),
            os.fstat(stream.fileno()),
        )
        data, tag, offset, length = _data_set(stream, start, stat.st_size, syntax, name)
    state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    file = PixelFile(
        path,
        name,
        stat.st_size,
        stat.st_mtime_ns,
        ":".join(map(str, state)),
        syntax,
        start,
        offset,
        length,
    )
    header = Header(file, data, tag)
    # A bare data set was only a guess from eight bytes; without Modality it was a wrong one.
    return header if marked or header.fields.text("Modality") else None
