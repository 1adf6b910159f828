"""Messages between two processes over a socket: JSON, with arrays in shared memory beside it.

Nothing that arrives is ever run or unpickled. The memory for arrays is made by the process that
asked, which so decides how much may be sent: the other one can't write a byte to a file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy is imported where it is needed: a start need not wait for it
    from numpy.typing import NDArray

    Array = NDArray[Any]

Message = dict[str, Any]

_HEAD = struct.Struct("<II")
_ALIGNED = 64
_MOST_JSON = 64 << 20
OWN_ROOM = 8 << 20
"""Bytes of shared memory that every conversation has; what is larger gets its own."""

DTYPES = ("uint8", "uint16", "int16", "uint32", "float32", "bool")


class Closed(Exception):
    """The other process has gone."""


def send(to: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send a message, and a file descriptor with it.

    Raises:
        Closed: nobody listens.
    """
    data = json.dumps(message).encode()
    head = _HEAD.pack(len(data), descriptor is not None)
    try:
        if descriptor is None:
            to.sendall(head + data)
        else:
            socket.send_fds(to, [head], [descriptor])
            to.sendall(data)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed from error


def receive(of: socket.socket) -> tuple[Message, int | None]:
    """Wait for a message, and for the file descriptor that comes with it.

    Raises:
        Closed: the other side has closed, or sent what is no message.
        TimeoutError: nothing came within the socket's own limit.
    """
    head, descriptors = b"", []
    try:
        while len(head) < _HEAD.size:
            part, found, *_ = socket.recv_fds(of, _HEAD.size - len(head), 1)
            descriptors += found
            if not part:
                raise Closed
            head += part
        size, carries = _HEAD.unpack(head)
        if size > _MOST_JSON or carries != len(descriptors):
            raise Closed
        message = json.loads(_exactly(of, size))
    except BaseException as error:
        for each in descriptors:
            os.close(each)
        if isinstance(error, ConnectionResetError | ValueError):
            raise Closed from error
        raise
    return message, descriptors[0] if descriptors else None


def _exactly(of: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = of.recv_into(left)
        if not count:
            raise Closed
        left = left[count:]
    return bytes(data)


def room_for(arrays: Sequence[Array]) -> int:
    """Bytes of shared memory that arrays take, one behind the other."""
    return sum(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays)


def map_room(descriptor: int, size: int) -> mmap.mmap:
    """Open shared memory that the other process made; the descriptor is closed."""
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def put(arrays: Sequence[Array], room: mmap.mmap) -> list[Message]:
    """Copy arrays into shared memory, and tell where each lies."""
    import numpy as np

    places, at = [], 0
    for array in arrays:
        if array.nbytes:
            into: Array = np.frombuffer(room, array.dtype, array.size, at).reshape(array.shape)
            into[...] = array
        places.append({"dtype": array.dtype.name, "shape": array.shape, "at": at})
        at += -(-array.nbytes // _ALIGNED) * _ALIGNED
    return places


def make_room(size: int) -> tuple[int, mmap.mmap]:
    """Make shared memory that ends with its last user.

    Returns:
        A descriptor to hand on and close, and the memory itself.

    Raises:
        OSError: there is not so much.
    """
    descriptor = os.memfd_create("cdt", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        return descriptor, mmap.mmap(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise


def take(places: Sequence[Message], room: mmap.mmap | None) -> list[Array]:
    """Return the arrays that lie in shared memory; they keep it alive.

    Raises:
        Closed: they are said to lie outside it, or are of another kind than any that is sent.
    """
    import numpy as np

    found: list[Array] = []
    for place in places:
        dtype, shape, at = place["dtype"], tuple(place["shape"]), place["at"]
        if dtype not in DTYPES or any(type(length) is not int or length < 0 for length in shape):
            raise Closed
        count = math.prod(shape)
        if not count:
            found.append(np.empty(shape, dtype))
            continue
        if room is None or not 0 <= at <= len(room) - count * np.dtype(dtype).itemsize:
            raise Closed
        found.append(np.frombuffer(room, dtype, count, at).reshape(shape))
    return found
