"""Progress, on stderr: bars on a terminal, nothing but the main lines elsewhere.

Of several processes started by `torchrun` only the first speaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], title: str) -> Iterable[T]:
    """Show a bar over `items` while they are used up; quiet when stderr is not a terminal."""
    if is_silent():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=title, file=sys.stderr, leave=False, disable=None, dynamic_ncols=True)


def say(line: str) -> None:
    """Print one line about the course of the run."""
    if not is_silent():
        print(line, file=sys.stderr, flush=True)


def is_silent() -> bool:
    """Whether this is one of several processes, but not the first."""
    return os.environ.get("RANK", "0") != "0"
