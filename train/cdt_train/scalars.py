"""The course of a phase as TensorBoard shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Scalars:
    """Writes one entry of a history after the other.

    Args:
        writer: of TensorBoard, or None to write nothing.
        phase: name of the phase; tags are PHASE/term.
    """

    def __init__(self, writer: Any, phase: str) -> None:
        self._writer, self._phase = writer, _slug(phase)

    def write(self, entry: Mapping[str, float]) -> None:
        """Write the terms of one epoch."""
        if self._writer is None:
            return
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(f"{self._phase}/{name}", value, int(entry["epoch"]))
        self._writer.flush()


@contextmanager
def scalars(folder: Path | None, phase: str, done: int) -> Iterator[Scalars]:
    """Open the scalars of a phase, in a folder of its own below `folder`.

    What an earlier run wrote of epochs after `done` is hidden by what is written now.

    Args:
        folder: for the run; None writes nothing.
        phase: name of the phase.
        done: epochs that are done.
    """
    if folder is None:
        yield Scalars(None, phase)
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / _slug(phase)), purge_step=done + 1)
    try:
        yield Scalars(writer, phase)
    finally:
        writer.close()


def _slug(name: str) -> str:
    """Return a name fit for a tag and a folder: `phase_2_episodes` for `phase 2 (episodes)`."""
    return re.sub(r"\W+", "_", name).strip("_")
