"""The main loop of the decoding process: a thread for each thing that it is asked for."""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from cdt_runtime.errors import CdtError
from cdt_runtime.sandbox import place, wire
from cdt_runtime.sandbox.limits import Limits


class Talk:
    """One conversation, seen from the decoding process.

    Args:
        line: the socket; closed by the caller.
        limits: of the process.
    """

    def __init__(self, line: socket.socket, limits: Limits) -> None:
        self._line, self.limits = line, limits

    def expect(self, seconds: float) -> None:
        """Tell how much processor time the answer may take."""
        wire.send(self._line, {"seconds": seconds})

    def say(self, value: Any, arrays: Sequence[wire.Array] = ()) -> None:
        """Answer."""
        message = {"value": value, "arrays": []}
        if room := wire.room_for(arrays):
            wire.send(self._line, {"room": room})
            _, descriptor = wire.receive(self._line)
            if descriptor is None:
                raise wire.Closed
            message["arrays"] = wire.put(arrays, descriptor)
        else:
            message["arrays"] = [
                {"dtype": one.dtype.name, "shape": one.shape, "at": 0} for one in arrays
            ]
        wire.send(self._line, message)

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


def _serve(line: socket.socket, limits: Limits) -> None:
    talk = Talk(line, limits)
    with line:
        try:
            from cdt_runtime.sandbox.jobs import JOBS

            request = talk.hear()
            JOBS[request["job"]](talk, **request["of"])
        except wire.Closed:
            return
        except BaseException as error:  # a decoder in Rust panics past Exception
            try:
                talk.fail(error)
            except (wire.Closed, OSError):
                return


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
    import numpy  # noqa: F401  before the limits: its libraries count for nothing then

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
