"""One line on stderr that tells how far long work is; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from time import monotonic

EVERY_S = 0.5


class Progress:
    """Counts items and says how many are done, how fast, and how long the rest will take.

    Args:
        what: the items, in the plural.
        total: how many there are.
        done: how many were there before; they don't count towards the speed.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = monotonic()
        self._shown = 0.0
        self._visible = sys.stderr is not None and sys.stderr.isatty()

    def add(self, count: int) -> None:
        """Count items that are done now."""
        self._done += count
        now = monotonic()
        if self._visible and (now - self._shown >= EVERY_S or self._done >= self._total):
            self._shown = now
            sys.stderr.write(f"\r\x1b[2K{self.line(now - self._started)}")
            sys.stderr.flush()

    def line(self, seconds: float) -> str:
        """Return the line, `seconds` after the start."""
        share = self._done / self._total if self._total else 1.0
        text = f"{self._what} {self._done} of {self._total} ({share:.0%})"
        speed = (self._done - self._before) / seconds if seconds > 0 else 0.0
        if speed <= 0:
            return text
        left = (self._total - self._done) / speed
        return f"{text}, {speed:.0f}/s, {_clock(left)} left"

    def close(self) -> None:
        """End the line."""
        if self._visible and self._shown:
            sys.stderr.write("\n")
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
