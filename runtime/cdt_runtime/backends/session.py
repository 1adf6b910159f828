"""What every engine offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import BackendError

Arrays = Mapping[str, NDArray[Any]]
Precision = Literal["auto", "fp32"]


class Session(Protocol):
    """One loaded graph."""

    engine: str
    """The engine and the device that really run it, as results name them."""

    half: bool
    """Whether it may compute in a half precision that the graph does not ask for."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph: inputs by name in, all outputs by name out."""


@dataclass(frozen=True)
class Backend:
    """An engine that may be there.

    Attributes:
        open: loads the bytes of an ONNX graph, with `auto` in the engine's fastest precision that
            still decides as before, with `fp32` in none below that of the graph; a BackendError
            says why it can't.
        present: tells in no time, and without loading anything, whether it is worth a try.
        packages: distributions that may provide it; results depend on their version.
        built: of the SHA-256 of a bundle's graphs, what tells that which was built for them here
            from any other; None where something is to be built first.
    """

    open: Callable[[bytes, Precision], Session]
    present: Callable[[], bool]
    packages: tuple[str, ...]
    built: Callable[[Sequence[str]], str | None] = lambda graphs: ""


class OutOfMemory(BackendError):
    """An engine has no memory for so many tiles at a time."""


_MEMORY = (
    "out of memory",
    "failed to allocate memory",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
)
"""What engines and drivers say then, in small letters."""


def failure(engine: str, error: Exception, cure: str = "") -> BackendError:
    """What an engine raised, as an error of ours in one line."""
    said = str(error).lower()
    full = isinstance(error, MemoryError) or any(words in said for words in _MEMORY)
    return (OutOfMemory if full else BackendError)(f"{engine}: {first_line(error)}{cure}")


def run_batch(
    session: Session, batch: Arrays, shared: Arrays
) -> tuple[dict[str, NDArray[Any]], int | None]:
    """Run a batch, in two halves where the engine has no memory for the whole.

    Args:
        session: a loaded graph.
        batch: the inputs with an item a tile.
        shared: the others.

    Returns:
        The outputs, and the size that had to do; None where the whole did.

    Raises:
        BackendError: there is no memory for half of it either; another engine is never taken.
    """
    try:
        return session.run({**batch, **shared}), None
    except OutOfMemory as error:
        said = str(error)
    count = len(next(iter(batch.values())))
    half = -(-count // 2)
    halves = [slice(start, start + half) for start in range(0, count, half)]
    try:
        found = [
            session.run({name: one[at] for name, one in batch.items()} | dict(shared))
            for at in halves
        ]
    except OutOfMemory as error:
        raise BackendError(
            f"{said}; nor for {half} at a time: free its memory, or use another --backend"
        ) from error
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}, half


def first_line(error: Exception) -> str:
    """What an engine says went wrong, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
