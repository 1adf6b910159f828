"""Progress, on stderr: bars on a terminal, nothing but the main lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], title: str) -> Iterable[T]:
    """Show a bar over `items` while they are used up; quiet when stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=title, file=sys.stderr, leave=False, disable=None, dynamic_ncols=True)


def say(line: str) -> None:
    """Print one line about the course of the run."""
    print(line, file=sys.stderr, flush=True)
