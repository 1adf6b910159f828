"""A look into an ONNX file before any engine sees it: it must hold its tensors itself.

A tensor may say that its values lie in another file, by a path; whoever wrote the graph would so
choose which file of this machine an engine reads.

Source: ONNX IR, `onnx.proto` (field numbers), and the encoding of Protocol Buffers.
"""

from __future__ import annotations

from collections.abc import Iterator

from cdt_runtime.errors import BundleError

MAX_DEPTH = 64
"""Of graphs within graphs; exporters write two or three."""

_KEY = b"location"
"""What names the other file: a graph without these bytes names none, however it is encoded."""

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_TENSOR = "tensor"
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph"},
        **{22: "sparse", 23: "sparse"},
    },
    "sparse": {1: _TENSOR, 2: _TENSOR},
}
"""Fields of each message that may lead to a tensor, and the message that each holds."""


class _Malformed(Exception):
    """Not Protocol Buffers."""


def require_whole(graph: bytes, name: str) -> None:
    """Make sure that a graph refers to no other file.

    Args:
        graph: bytes of an ONNX model.
        name: of it, for errors.

    Raises:
        BundleError: it does, or can't be told for it is no ONNX.
    """
    if _KEY not in graph:
        return
    try:
        outside = _points_outside(memoryview(graph), "model", 0)
    except _Malformed as error:
        raise BundleError(f"{name}: is no ONNX graph: export it again") from error
    if outside:
        raise BundleError(
            f"{name}: keeps tensors in another file: expected a graph in one file: export it again"
        )


def _points_outside(message: memoryview, kind: str, depth: int) -> bool:
    if depth > MAX_DEPTH:
        raise _Malformed
    for field, value in _fields(message):
        if kind == _TENSOR:
            if field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0):
                return True
        elif (inner := _INSIDE[kind].get(field)) is not None:
            if not isinstance(value, memoryview):
                raise _Malformed
            if _points_outside(value, inner, depth + 1):
                return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Each field's number and its value: bytes, or a whole number."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise _Malformed
        yield field, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise _Malformed
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed
