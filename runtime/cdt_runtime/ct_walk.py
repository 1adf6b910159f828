"""The files below a folder, and how messages call them.

Links are never followed. Folders are named after patients and dates, so no message shows one but
the last part of the path that the user gave, and neither that nor a file's name where it may be a
UID, a date or a number: then the place in the walk has to do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cdt_runtime.errors import SeriesError
from cdt_runtime.printable import is_personal, last_part, printable, reason

GIVE_FOLDER = "give the folder that holds the CT series"
CHECK = "check its path and permissions"


@dataclass(frozen=True)
class Folder:
    """A folder to be read; the path is for the system, the name for messages."""

    path: Path
    name: str


def open_folder(path: Path) -> Folder:
    """Checks that a path is a folder.

    Raises:
        SeriesError: it is missing, something else, or out of reach.
    """
    folder = Folder(path, shown_name(path))
    mode = _mode(folder)
    if mode is None:
        raise SeriesError(f"{folder.name}: no such folder: {GIVE_FOLDER}")
    if not stat.S_ISDIR(mode):
        raise SeriesError(f"{folder.name} is not a folder: {GIVE_FOLDER}")
    return folder


def find_folder(path: Path) -> Folder | None:
    """As `open_folder`, but None where nothing or something else is there."""
    folder = Folder(path, shown_name(path))
    return folder if stat.S_ISDIR(_mode(folder) or 0) else None


def _mode(folder: Folder) -> int | None:
    """Kind and permissions of what lies there; None where nothing does."""
    try:
        return folder.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL is a ValueError
        return None
    except OSError as error:
        raise SeriesError(f"{folder.name} can't be opened ({reason(error)}): {CHECK}") from None


def shown_name(path: Path) -> str:
    """Return how messages call a folder that the user gave."""
    name = last_part(path)
    return "the folder" if is_personal(name) else name


def file_name(entry: os.DirEntry[str], place: int, total: int) -> str:
    """How messages call a file: `file 5 of 24 (1-005.dcm)`."""
    shown = "" if is_personal(entry.name) else f" ({printable(entry.name)})"
    return f"file {place} of {total}{shown}"


def entries(folder: Folder) -> Iterator[os.DirEntry[str]]:
    """Files and links below a folder, by name; folders are entered, links are not.

    Raises:
        SeriesError: the folder or one in it can't be listed.
    """
    waiting = _listed(folder.path, folder.name)
    inside = f"a folder inside {folder.name}"
    while waiting:
        entry = waiting.pop()
        if _is_folder(entry, inside):
            waiting += _listed(Path(entry.path), inside)
        else:
            yield entry


def _listed(path: Path, name: str) -> list[os.DirEntry[str]]:
    """The last by name first, as a stack wants them."""
    try:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise SeriesError(f"{name} can't be listed ({reason(error)}): {CHECK}") from None


def _is_folder(entry: os.DirEntry[str], inside: str) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError as error:
        raise SeriesError(f"{inside} can't be listed ({reason(error)}): {CHECK}") from None


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file and no link; one that can't be asked counts as a file."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return True  # reading it will say what is wrong
