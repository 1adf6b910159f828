"""The main loop of the decoding process: a thread for each thing that it is asked for."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import PurePath
from typing import Any

from cdt_runtime.errors import CdtError
from cdt_runtime.sandbox import place, wire
from cdt_runtime.sandbox.limits import Limits

_AHEAD = ("numpy", "cdt_runtime.sandbox.jobs", "cdt_runtime.ct", "cdt_runtime.tiff")
"""What most jobs need."""


class Talk:
    """One conversation, seen from the decoding process.

    Args:
        line: the socket; closed by the caller.
        room: memory for small answers.
        limits: of the process.
    """

    def __init__(self, line: socket.socket, room: mmap.mmap, limits: Limits) -> None:
        self._line, self._room, self.limits = line, room, limits

    def expect(self, seconds: float) -> None:
        """Tell how much processor time the answer may take."""
        wire.send(self._line, {"seconds": seconds})

    def say(self, value: Any, arrays: Sequence[wire.Array] = ()) -> None:
        """Answer."""
        room, size = self._room, wire.room_for(arrays)
        if size > wire.OWN_ROOM:
            wire.send(self._line, {"room": size})
            room = _room(self._line, size)
        wire.send(self._line, {"value": value, "arrays": wire.put(arrays, room)})

    def hear(self) -> wire.Message:
        """Wait for what is asked next."""
        message, _ = wire.receive(self._line)
        return message

    def fail(self, error: BaseException) -> None:
        """Tell what went wrong; of what is no error of ours the kind and place alone, no values."""
        if isinstance(error, CdtError):
            message = {"error": type(error).__name__, "text": str(error)}
        elif isinstance(error, MemoryError):
            message = {"fault": "memory"}
        else:
            message = {"fault": _where(error)}
        wire.send(self._line, message)


def _where(error: BaseException) -> str:
    """Such as `IndexError in tiff_page.py, line 120`."""
    steps = traceback.extract_tb(error.__traceback__)
    own = [step for step in steps if "cdt_runtime" in step.filename] or steps
    place_of = f" in {PurePath(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place_of}"


def _room(line: socket.socket, size: int) -> mmap.mmap:
    """Wait for memory."""
    _, descriptor = wire.receive(line)
    if descriptor is None:
        raise wire.Closed
    return wire.map_room(descriptor, size)


def _serve(line: socket.socket, limits: Limits) -> None:
    """Answer one thing after another until the caller closes."""
    from cdt_runtime.sandbox.jobs import JOBS

    with line, suppress(wire.Closed, OSError):
        talk = Talk(line, _room(line, wire.OWN_ROOM), limits)
        while True:
            request = talk.hear()
            try:
                JOBS[request["job"]](talk, **request["of"])
            except wire.Closed:
                raise
            except BaseException as error:  # a decoder in Rust panics past Exception
                talk.fail(error)


def main(control: int, board: int) -> None:
    """Serve until the process that asks has gone.

    Args:
        control: descriptor of the socket by which conversations come.
        board: descriptor of the memory of `place`.
    """
    sys.setswitchinterval(1e-3)  # answers to others must not wait for a parser
    place.open_board(board)
    os.close(board)
    line = socket.socket(fileno=control)
    # While nobody waits yet, and before the limits: what libraries take counts for nothing.
    for name in _AHEAD:
        import_module(name)

    limits = Limits()
    while True:
        try:
            _, descriptor = wire.receive(line)
        except wire.Closed:
            os._exit(0)  # at once, whatever a thread may still be at
        if descriptor is None:
            continue
        talk = socket.socket(fileno=descriptor)
        threading.Thread(target=_serve, args=(talk, limits), daemon=True).start()
