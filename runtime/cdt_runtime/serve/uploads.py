"""Files of a request: on disk while it is answered, for the decoding process reads paths."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cdt_runtime.errors import InputError
from cdt_runtime.printable import printable

LONGEST = 100
COPY_BYTES = 1 << 20


@asynccontextmanager
async def stored(files: Sequence[Any]) -> AsyncIterator[list[Path]]:
    """Write uploads into a folder that only this user may read, and remove it afterwards.

    Other requests go on meanwhile.

    Args:
        files: Starlette's `UploadFile`s.

    Raises:
        InputError: one has no name or no content, or two have the same name.
    """
    folder = tempfile.TemporaryDirectory(prefix="cdt-serve-")
    try:
        yield await asyncio.to_thread(_copied, files, Path(folder.name))
    finally:
        await asyncio.to_thread(folder.cleanup)


def _copied(files: Sequence[Any], folder: Path) -> list[Path]:
    paths = []
    for upload in files:
        path = folder / safe_name(upload.filename)
        if path.exists():
            raise InputError(f"{path.name}: is given twice: give each file a name of its own")
        with path.open("xb") as file:
            shutil.copyfileobj(upload.file, file, COPY_BYTES)
        if not path.stat().st_size:
            raise InputError(f"{path.name}: is empty: send it again")
        paths.append(path)
    return paths


def safe_name(given: str | None) -> str:
    """The last part of a file's name, fit for a disk and for results.

    Raises:
        InputError: nothing is left of it.
    """
    last = PurePosixPath((given or "").replace("\\", "/")).name
    name = printable(last).replace("/", "_").strip(". ")[-LONGEST:].lstrip("-. ")
    if not name or len(name.encode()) > 2 * LONGEST:
        raise InputError("a file without a usable name: give it one, such as tile.tif")
    return name
