"""A row of the table of series that can't be used, and the ways to spoil one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs as codecs
import numpy as np
from dicom_maker import (
    Change,
    data_set,
    enhanced,
    every,
    save,
    set_compressed,
    values,
)
from pydicom import uid as uids


@dataclass(frozen=True)
class Bad:
    """A series that is refused, and what must be said about it."""

    says: str
    change: Change | None = None
    count: int = 8
    after: Callable[[Path], Any] | None = None
    """What is done to the folder once the series is written."""
    options: dict[str, Any] = field(default_factory=dict)
    syntax: str = uids.ExplicitVRLittleEndian


def cut(name: str, size: int) -> Callable[[Path], Any]:
    """Keeps the first bytes of a file, or all but some where the size is negative."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def patched(old: bytes, new: bytes) -> Callable[[Path], Any]:
    """Replaces bytes in one file: values that pydicom refuses to write."""

    def after(folder: Path) -> None:
        data = (folder / "003.dcm").read_bytes()
        assert len(old) == len(new)
        assert data.count(old) == 1
        (folder / "003.dcm").write_bytes(data.replace(old, new))

    return after


def written(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def another(**attributes: Any) -> Callable[[Path], Any]:
    """Adds one more file of these attributes."""

    def after(folder: Path) -> None:
        ds = data_set(3)
        every(**attributes)(ds, 3)
        save(ds, folder / "extra.dcm")

    return after


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def bomb(folder: Path) -> None:
    """600 MB of zeros in 0.6 MB, in the data set of a deflated file."""
    import zlib

    data = (folder / "003.dcm").read_bytes()
    start = data.index(b"1.2.840.10008.1.2.1.99") + 22
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    (folder / "003.dcm").write_bytes(data[:start] + block * 600 + packer.flush())


def enhanced_with_7_streams(folder: Path) -> None:
    emptied(folder)
    ds = enhanced()
    set_compressed(ds, uids.JPEGLSLossless, *[LS_STREAM] * 7)
    save(ds, folder / "extra")


def j2k(rows: int, columns: int) -> bytes:
    return codecs.jpeg2k_encode(
        np.zeros((rows, columns), np.uint16), level=0, reversible=True, codecformat="j2k"
    )


LS_STREAM = codecs.jpegls_encode(values(0).astype(np.uint16))
FACE_ON = [1, 0, 0, 0, 0, -1]
SIDE_ON = [0, 1, 0, 0, 0, -1]
