"""Names and counts as they stand in messages: on one line, and never a patient's."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_NAME = 255
"""Characters of a name that a message shows: what file systems allow."""

_PERSONAL = re.compile(r"\d{6}|(\d+\.){2}|\d{4}-\d\d-\d\d|\^")
"""A long number (a date, a patient's number), a UID, or the mark between the parts of a name."""


def printable(text: str, *, instead: str = "?", most: int = MAX_NAME) -> str:
    """Text as one line: control characters and broken bytes become `instead`, the rest is cut."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else instead for c in text)
    return text[:most]


def last_part(path: Path) -> str:
    """The last part of a path, also of `.`; the folders above it are not shown."""
    try:
        name = path.name or os.path.basename(os.path.abspath(path))
    except OSError:  # the working folder is gone
        name = ""
    return printable(name or str(path))


def is_personal(name: str) -> bool:
    """Whether the name of a file or folder may tell the patient, as names that scanners give."""
    return _PERSONAL.search(name) is not None


def counted(number: int, thing: str) -> str:
    """Such as `1 file of another modality` and `2 files of another modality`."""
    noun, *rest = thing.split(" of ")
    return " of ".join([f"{number} {noun}{'s' * (number != 1)}", *rest])


def reason(error: OSError) -> str:
    """What the system says, without the path that `str` would add."""
    return error.strerror or type(error).__name__
