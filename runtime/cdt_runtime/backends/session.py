"""What every engine offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

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


def first_line(error: Exception) -> str:
    """What an engine says went wrong, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
