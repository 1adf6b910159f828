"""How phantom data get into a folder: whole or not at all, and never over something else.

PHANTOM.json    what the data were made with; written last
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_train.data.phantom_tiles import CHANNELS, MPP

MARK = "PHANTOM.json"


def write_once(folder: Path, made: Mapping[str, object], write: Callable[[Path], None]) -> None:
    """Fills a folder all at once, or not at all; does nothing where the same data lie already.

    Args:
        folder: What to create.
        made: What the data are made with, as `PHANTOM.json` will say it.
        write: Writes all but `PHANTOM.json` into the folder that it is given.

    Raises:
        DatasetError: `folder` holds something else.
    """
    if _is_there(folder, made):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, because a rename can't cross file systems; a name of its own for each run
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        write(partial)
        (partial / MARK).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        _move(partial, folder, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_mark(folder: Path) -> dict[str, object] | None:
    """Returns what `PHANTOM.json` says, or None for a folder without one."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a table; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_tile(path: Path, tile: NDArray[np.uint8]) -> None:
    """OME-TIFF whatever the name ends in; the same pixels give the same bytes."""
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": list(CHANNELS)},
        "PhysicalSizeX": MPP,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": MPP,
        "PhysicalSizeYUnit": "µm",
        "UUID": str(uuid.UUID(bytes=hashlib.sha256(tile.tobytes()).digest()[:16])),
    }
    tifffile.imwrite(
        path,
        tile,
        ome=True,
        photometric="minisblack",
        compression="deflate",
        predictor=True,
        resolution=(1e4 / MPP, 1e4 / MPP),
        resolutionunit="CENTIMETER",
        metadata=metadata,
    )


def _is_there(folder: Path, made: Mapping[str, object]) -> bool:
    if not folder.exists():
        return False
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    found = read_mark(folder)
    if found is None:
        raise DatasetError(f"{folder} exists and is no phantom data: choose a new folder")
    if found != made:
        raise DatasetError(
            f"{folder} holds phantom data made with {found}, not with {made}: "
            "delete it or choose a new folder"
        )
    return True


def _move(partial: Path, folder: Path, made: Mapping[str, object]) -> None:
    try:
        os.replace(partial, folder)
    except OSError:
        # another run was faster: fine if it wrote the same
        if not _is_there(folder, made):
            raise
