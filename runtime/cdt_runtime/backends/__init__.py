"""Inference engines behind one small protocol.

A backend turns the bytes of an ONNX graph into a session; a session runs named arrays. To add one,
write a module beside this file and one line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from cdt_runtime.backends.ort import cpu, cuda
from cdt_runtime.errors import BackendError

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """One loaded graph."""

    engine: str
    """The engine and the device that really run it, as results name them."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph: inputs by name in, all outputs by name out."""


BACKENDS: dict[str, Callable[[bytes], Session]] = {
    "onnxruntime": cpu,
    "cuda": cuda,
}


def open_session(backend: str, graph: bytes) -> Session:
    """Load a graph in the engine of that name.

    Raises:
        BackendError: no such engine, or it can't run here.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](graph)
