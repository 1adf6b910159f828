"""Arrays of an npz file, judged by their headers before anything is allocated; never a pickle."""

from __future__ import annotations

import hashlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError

MAX_BYTES = 2**34
"""Decoded bytes of the arrays taken from one file."""

_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    MemoryError,
    RuntimeError,  # encrypted; NotImplementedError: an unknown compression; RecursionError
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Header:
    """What an array says of itself.

    Attributes:
        shape: Of the array.
        dtype: Plain numbers, booleans or text; never objects.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Decoded size."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of all arrays in the file; no array is decoded.

    Raises:
        DatasetError: the file is no npz, or an array is damaged or pickled.
    """
    with _opened(path) as archive:
        names = [info.filename for info in archive.infolist() if info.filename.endswith(".npy")]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DatasetError(f"{path}: array '{_short(twice[0])}' is there twice: save it again")
        return {_short(name): _header(path, archive, name) for name in names}


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Decode arrays of the file.

    Args:
        path: An npz file.
        names: Of arrays that `read_headers` named.

    Raises:
        DatasetError: together they are over the limit, or one is damaged.
    """
    headers = read_headers(path)
    chosen = {name: headers[name] for name in names}
    _check_size(path, chosen)
    arrays = {}
    with _opened(path) as archive:
        for name in chosen:
            with _reading(path, name), archive.open(f"{name}.npy") as stream:
                arrays[name] = npy.read_array(stream, allow_pickle=False)
    return arrays


def require_array(path: Path, headers: Mapping[str, Header], name: str) -> Header:
    """The header of an array that the file must have.

    Raises:
        DatasetError: it is missing.
    """
    if name not in headers:
        found = ", ".join(sorted(headers)[:12]) or "nothing"
        raise DatasetError(f"{path}: has no array '{name}', only {found}: save it under that name")
    return headers[name]


def require_dtype(path: Path, name: str, header: Header, expected: tuple[str, ...]) -> None:
    """Refuse an array of another dtype.

    Raises:
        DatasetError: it has another.
    """
    if header.dtype.newbyteorder("=").name not in expected:
        raise DatasetError(
            f"{path}: array '{name}' is {header.dtype.name}, expected {' or '.join(expected)}: "
            "convert it"
        )


def require_finite(path: Path, name: str, array: NDArray[Any]) -> None:
    """Refuse NaN and infinity; the message names the first row.

    Raises:
        DatasetError: there is one.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return
    for index, row in enumerate(array):
        if not np.isfinite(row).all():
            raise DatasetError(
                f"{path}: array '{name}' has NaN or infinity at index {index}: leave it out, or "
                "fill it"
            )


def pixels_hash(pixels: NDArray[Any]) -> str:
    """Identity of decoded pixels."""
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _check_size(path: Path, headers: Mapping[str, Header]) -> None:
    total = sum(header.nbytes for header in headers.values())
    if total > MAX_BYTES:
        widest = max(headers, key=lambda name: headers[name].nbytes)
        raise DatasetError(
            f"{path}: decodes to {total / 2**30:.0f} GiB, over the limit of "
            f"{MAX_BYTES / 2**30:.0f} GiB a file ('{widest}' has the shape "
            f"{headers[widest].shape}): split it, or make the images smaller"
        )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except _BROKEN as error:
        raise DatasetError(f"{path}: is no npz file, or cut short: fetch it again") from error
    with archive:
        yield archive


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except _BROKEN as error:
        raise DatasetError(f"{path}: array '{name}' is damaged: fetch the file again") from error


def _header(path: Path, archive: zipfile.ZipFile, member: str) -> Header:
    name = _short(member)
    with _reading(path, name), archive.open(member) as stream:
        shape, dtype = _parse(stream)
        header = Header(shape, dtype)
        if dtype.hasobject or dtype.kind not in "buifUS":
            raise DatasetError(
                f"{path}: array '{name}' is {dtype.name}, expected numbers or text: pickled "
                "objects are not read; save it as a plain array"
            )
        held = archive.getinfo(member).file_size - stream.tell()
        if min(shape, default=0) < 0 or held != header.nbytes:
            raise DatasetError(
                f"{path}: array '{name}' of shape {shape} takes {header.nbytes} bytes and has "
                f"{held}: fetch the file again"
            )
    return header


def _parse(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = readers[version](stream)
    return shape, dtype


def _short(member: str) -> str:
    return member.removesuffix(".npy")
