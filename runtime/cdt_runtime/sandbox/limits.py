"""What the decoding process may use; the kernel holds it to that.

It may write to no file, open few, leave no core dump (they hold patients' pixels), and use the
processor and memory as far as what it was asked for needs.
"""

from __future__ import annotations

import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CPU_S = 10.0
CPU_S_PER_BYTE = 1e-6
"""A second a megabyte of file: a third of the slowest decoder's pace."""

CPU_S_PER_FILE = 0.01
OPEN_FILES = 256
MEMORY = 4 << 30
"""Bytes on top of what the interpreter takes: the largest tile, decoded, copied and sent."""


def cpu_seconds(size: int, files: int = 1) -> float:
    """Return the processor time that reading files may take.

    Args:
        size: bytes of them.
        files: how many they are.
    """
    return CPU_S + CPU_S_PER_BYTE * size + CPU_S_PER_FILE * files


class Limits:
    """The limits of this process; made once, at its start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._granted: dict[object, tuple[float, int]] = {}
        self._base = _virtual_size()
        for what, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
        ):
            resource.setrlimit(what, (most, most))
        self._set()

    @contextmanager
    def granted(self, seconds: float, extra: int = 0) -> Iterator[None]:
        """Let the process use as much more while this lasts.

        Args:
            seconds: of processor time, whichever thread it is spent by.
            extra: bytes of memory over `MEMORY`.
        """
        key = object()
        with self._lock:
            self._granted[key] = (seconds, extra)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                del self._granted[key]

    def _set(self) -> None:
        used = time.process_time()
        seconds = used + sum(one for one, _ in self._granted.values()) + 1
        memory = self._base + MEMORY + sum(extra for _, extra in self._granted.values())
        _lower(resource.RLIMIT_CPU, math.ceil(seconds))
        _lower(resource.RLIMIT_AS, memory)


def _lower(what: int, most: int) -> None:
    """Set the limit that can be raised again, within the one that can't."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _virtual_size() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
