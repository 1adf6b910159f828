"""One DICOM file -> what its header says. No pixel is decoded here.

A file like one before it is read by that one's layout (`dicom_alike`), another ordinary file is
walked over (`dicom_walk`), any other parsed by pydicom: the values are the same. What is used of
them is then read through `Fields`, which names files and attributes and never a value: header text
can hold a patient's name, and pydicom's own warnings print it (see `dicom_quiet`).
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

from cdt_runtime.dicom_alike import Layouts
from cdt_runtime.dicom_fields import EXPORT_AGAIN, Fields
from cdt_runtime.dicom_quiet import load_pydicom
from cdt_runtime.dicom_syntax import SYNTAXES, Syntax
from cdt_runtime.dicom_walk import LONG_VRS, PIXEL_TAGS, Unusual, Walked, walk
from cdt_runtime.errors import SeriesError
from cdt_runtime.printable import reason
from cdt_runtime.sandbox import place

MAX_INFLATED = 512 << 20
"""Bytes that a deflated file may unpack to."""

HEAD_BYTES = 132
"""The preamble and the DICM mark."""

PIXEL_DATA = 0x7FE00010

T = TypeVar("T")


@contextmanager
def reading(name: str, cure: str = "check its permissions, or copy it again") -> Iterator[None]:
    """Whatever the system says about a file becomes a SeriesError of one line."""
    try:
        with place.at(name):
            yield
    except OSError as error:
        raise SeriesError(f"{name} can't be read ({reason(error)}): {cure}") from None


@dataclass(frozen=True)
class PixelFile:
    """Where the pixels of one file lie."""

    path: str = field(repr=False)
    name: str
    size: int
    mtime_ns: int
    state: tuple[int, ...]
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

    def once(self, make: Callable[[Header], T]) -> T:
        """What a function makes of the first of the headers that are alike; it is called once.

        Alike are those of one scan that differ in their file and in ImagePositionPatient alone;
        where `make` looks at these, what it gives is the first's. Errors are not kept.
        """
        if not isinstance(self.data, Walked):
            return make(self)
        memo = self.data.memo
        if make not in memo:
            memo[make] = make(self)
        return cast(T, memo[make])

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


@dataclass(frozen=True)
class _Found:
    """What a file gives: its attributes, and where data set and pixels lie."""

    data: Any
    syntax: Syntax
    start: int
    tag: int | None
    offset: int
    length: int


def _of_walk(start: int, syntax: Syntax, walked: Walked) -> _Found:
    where = walked.pixel_tag, walked.pixel_offset, walked.pixel_length
    return _Found(walked, syntax, start, *where)


def _data_set(stream: BinaryIO, size: int, name: str, layouts: Layouts) -> _Found:
    """Reads what comes after the DICM mark; a layout that may help with other files is kept."""
    uid = _read_meta(stream, name)
    syntax, start = _syntax_of(uid, stream, name), stream.tell()
    if not syntax.implicit and syntax.little_endian and not syntax.deflated:
        try:
            walked = walk(stream, start, size)
        except Unusual:
            stream.seek(start)
        else:
            layouts.keep(stream, start, syntax, walked)
            return _of_walk(start, syntax, walked)
    source = inflate(stream, name) if syntax.deflated else stream
    data, stop = _parse(source, syntax, name)
    return _Found(data, syntax, start, stop.tag, source.tell() + stop.header_bytes, stop.length)


def _parse(stream: BinaryIO, syntax: Syntax, name: str) -> tuple[Any, _AtPixels]:
    load_pydicom()
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


def read_header(path: str, name: str, layouts: Layouts) -> Header | None:
    """Reads one file up to its pixels; call it inside `quiet`.

    Args:
        path: the file.
        name: how messages call it.
        layouts: of the files before it.

    Returns:
        None where the file is not DICOM.

    Raises:
        SeriesError: the file bears the DICM mark and does not parse.
    """
    with open(path, "rb", buffering=0) as file:
        head, stat = file.read(layouts.reach), os.fstat(file.fileno())
        if not looks_like_dicom(head):
            return None
        if alike := layouts.find(head):
            layout, walked = alike
            found = _of_walk(layout.start, layout.syntax, walked)
        else:
            stream = io.BufferedReader(file)
            stream.seek(HEAD_BYTES if _is_marked(head) else 0)
            found = _data_set(stream, stat.st_size, name, layouts)
    header = Header(_pixel_file(path, name, stat, found), found.data, found.tag)
    # A bare data set was only a guess from eight bytes; without Modality it was a wrong one.
    return header if _is_marked(head) or header.fields.text("Modality") else None


def _pixel_file(path: str, name: str, stat: os.stat_result, found: _Found) -> PixelFile:
    return PixelFile(
        path=path,
        name=name,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        state=(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns),
        syntax=found.syntax,
        data_start=found.start,
        offset=found.offset,
        length=found.length,
    )
