"""The decoding process, seen from the one that asks.

It is started when it is first needed and lives as long as this process. Whatever it ends by becomes
one error that names the input; then another is started. Where several things were asked for at the
time, each is asked for again in a process of its own, so that only the one at fault fails.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cdt_runtime.errors import (
    CdtError,
    InputError,
    MissingDependencyError,
    SeriesError,
    TileError,
)
from cdt_runtime.printable import counted
from cdt_runtime.sandbox import place, wire

START_S = 60.0
"""Seconds until the first answer, in which the process may have to start."""

WALL_S, WALL_PER_CPU = 30.0, 4.0
"""Seconds that an answer may take: these, and so many for each of processor time."""

END_S = 5.0
MOST = 6 << 30
"""Bytes that an answer may have."""

_KINDS: dict[str, type[CdtError]] = {
    kind.__name__: kind for kind in (TileError, SeriesError, MissingDependencyError)
}
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from cdt_runtime.sandbox.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


@dataclass(frozen=True)
class Subject:
    """What is read, for errors.

    Attributes:
        name: of the file or folder.
        error: the kind of input error.
    """

    name: str
    error: type[InputError]


class Ended(Exception):
    """The decoding process ended, or had to be ended.

    Args:
        how: in words, behind a name and a colon.
        at: the files that it was reading, where more than one thing was.
        shared: whether it may have ended by something else than this.
    """

    def __init__(self, how: str, at: list[str], shared: bool) -> None:
        super().__init__(how)
        self.how, self.at, self.shared = how, at, shared


class Worker:
    """One decoding process; conversations with it run side by side."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        descriptor, self._board = wire.make_room(place.SIZE)
        self._lock = threading.Lock()
        self._talks: set[Talk] = set()
        self._idle: list[Talk] = []
        self._how: str | None = None
        try:
            # -S: the packages lie where this process found them, so nothing need be looked for.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-B", "-c", _START),
                    *(str(theirs.fileno()), str(descriptor), *filter(None, sys.path)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries quote header values there
                pass_fds=(theirs.fileno(), descriptor),
                start_new_session=True,
                env={
                    **{name: os.environ[name] for name in _KEPT if name in os.environ},
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
            os.close(descriptor)

    @property
    def ended(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._how is not None or self._process.poll() is not None

    def talk(self) -> Talk:
        """Begin a conversation, or take up one that is idle.

        Raises:
            Ended: the process has ended.
        """
        with self._lock:
            talk = self._idle.pop() if self._idle else self._new_talk()
            talk.begin(beside=bool(self._talks))
            for other in self._talks:
                other.shared = True
            self._talks.add(talk)
        return talk

    def _new_talk(self) -> Talk:
        ours, theirs = socket.socketpair()
        descriptor, room = wire.make_room(wire.OWN_ROOM)
        try:
            with theirs:
                wire.send(self._control, {}, theirs.fileno())
            wire.send(ours, {}, descriptor)
        except wire.Closed:
            ours.close()
            raise Ended(self.kill(), [], True) from None
        finally:
            os.close(descriptor)
        return Talk(self, ours, room)

    def keep(self, talk: Talk) -> None:
        """Take a conversation back that has come to an answer."""
        with self._lock:
            self._talks.discard(talk)
            self._idle.append(talk)

    def forget(self, talk: Talk) -> None:
        """Count a conversation no more."""
        with self._lock:
            self._talks.discard(talk)

    def files(self) -> list[str]:
        """Return the names of the files that it reads, or read when it ended."""
        return place.read_board(self._board)

    def kill(self, how: str | None = None) -> str:
        """End it, and tell in words how it ended: as given, where it had not already."""
        if self._how is None and how is not None:
            self._how = how
        try:
            self._process.wait(0 if how else END_S)
        except subprocess.TimeoutExpired:
            self._end_group()
        if self._how is None:
            self._how = _in_words(self._process.returncode)
        return self._how

    def _end_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it and let go of all that it needed."""
        self._control.close()
        with self._lock:
            idle, self._idle = self._idle, []
        for talk in idle:
            talk.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._end_group()


class Talk:
    """One conversation with a decoding process.

    Attributes:
        shared: whether others ran at any time beside it.
    """

    def __init__(self, worker: Worker, line: socket.socket, room: mmap.mmap) -> None:
        self._worker, self._line, self._room = worker, line, room
        self.begin(beside=False)

    def begin(self, *, beside: bool) -> None:
        """Make it ready for a question.

        Args:
            beside: whether others run at this time.
        """
        self.shared, self._begun = beside, False
        self._line.settimeout(START_S)

    def ask(self, job: str, **of: Any) -> None:
        """Ask for something; `hear` brings the answer.

        Raises:
            Ended: the process has ended.
        """
        try:
            wire.send(self._line, {"job": job, "of": of})
        except wire.Closed:
            raise self._ended() from None
        except TimeoutError:
            raise self._ended(self._too_slow()) from None

    def hear(self) -> tuple[Any, list[wire.Array]]:
        """Wait for an answer.

        Returns:
            Its value and its arrays.

        Raises:
            CdtError: what the input is refused for.
            Ended: the process ended, took too long or too much memory.
        """
        room = None
        try:
            while True:
                message, _ = wire.receive(self._line)
                if "seconds" in message:
                    self._begun = True
                    self._line.settimeout(WALL_S + WALL_PER_CPU * message["seconds"])
                elif "room" in message:
                    room = self._make_room(message["room"])
                elif "value" in message:
                    arrays = wire.take(message["arrays"], room or self._room)
                    # What others use next must not lie in it any more.
                    return message["value"], arrays if room else [one.copy() for one in arrays]
                else:
                    raise self._failure(message)
        except wire.Closed:
            raise self._ended() from None
        except TimeoutError:
            raise self._ended(self._too_slow()) from None
        except (KeyError, TypeError, AttributeError):  # no message of ours
            raise self._ended("its decoder failed: the file is damaged: fetch it again") from None

    def close(self) -> None:
        """End the conversation."""
        self._worker.forget(self)
        self._line.close()

    def _make_room(self, size: int) -> mmap.mmap:
        if not 0 < size <= MOST:
            raise self._ended(f"decodes to over {MOST >> 30} GiB: crop it")
        try:
            descriptor, room = wire.make_room(size)
        except OSError:
            raise Ended(_memory(), [], self.shared) from None
        try:
            wire.send(self._line, {}, descriptor)
        finally:
            os.close(descriptor)
        return room

    def _failure(self, message: wire.Message) -> Exception:
        """What the other process says went wrong, as an error of this one."""
        if "error" in message:
            kind = _KINDS.get(message["error"], InputError)
            return kind(message["text"])
        if message["fault"] == "memory":
            return Ended(_memory(), [], self.shared)
        return Ended(
            f"its decoder failed ({message['fault']}): the file is damaged, or of a kind not met "
            "before: fetch it again, or save it anew",
            [],
            shared=False,
        )

    def _too_slow(self) -> str:
        return (
            f"no answer from its decoder in {self._line.gettimeout():.0f} s: check the disk that "
            "it lies on, or fetch it again"
        )

    def _ended(self, how: str | None = None) -> Ended:
        """End the process where it has not ended itself, and tell how that came."""
        words = self._worker.kill(how)
        # What had not begun when the process ended was not what ended it.
        innocent = how is None and (self.shared or not self._begun)
        return Ended(words, self._worker.files(), innocent)


def _memory() -> str:
    from cdt_runtime.sandbox.limits import MEMORY

    return f"decoding it takes over {MEMORY >> 30} GiB of memory: crop it"


def _in_words(code: int) -> str:
    """What an exit code means for what was read."""
    if code == -signal.SIGXCPU:
        return (
            "decoding it takes longer than any sound file of its size: it is damaged: fetch it "
            "again"
        )
    if code == -signal.SIGKILL:
        return "its decoder was killed, perhaps for memory: free some, or crop it"
    if code < 0:
        return f"its decoder crashed ({signal.Signals(-code).name}): it is damaged: fetch it again"
    return f"the decoding process ended (exit code {code}): install cdt-edge again"


class Sandbox:
    """The decoding process of this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def forget(self) -> None:
        """Leave the process to whom it belongs: this is a fork, and a lock may be held for ever."""
        self._lock, self._worker = threading.Lock(), None

    def start(self) -> None:
        """Start the process, where none runs, without waiting for it."""
        self._current()

    def ask(self, subject: Subject, job: str, **of: Any) -> tuple[Any, list[wire.Array]]:
        """Ask for one thing.

        Args:
            subject: what it is about.
            job: of `jobs.JOBS`.
            of: what that takes.

        Returns:
            The answer's value and its arrays.

        Raises:
            CdtError: what the input is refused for, or that its decoder failed.
        """
        try:
            return _once(self._current(), job, of)
        except Ended as end:
            if not end.shared:
                raise _as_error(subject, end) from None
        worker = Worker()
        try:
            return _once(worker, job, of)
        except Ended as end:
            raise _as_error(subject, end) from None
        finally:
            worker.close()

    @contextmanager
    def conversation(self, subject: Subject) -> Iterator[Talk]:
        """Ask for one thing after another; what ends the process ends it.

        Raises:
            CdtError: as `ask`, where what is done inside raises `Ended`.
        """
        try:
            talk = self._current().talk()
            try:
                yield talk
            finally:
                talk.close()
        except Ended as end:
            raise _as_error(subject, end) from None

    def close(self) -> None:
        """End the process; the next thing asked for starts another."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _current(self) -> Worker:
        with self._lock:
            if self._worker is not None and self._worker.ended:
                self._worker.close()
                self._worker = None
            if self._worker is None:
                self._worker = Worker()
            return self._worker


def _once(worker: Worker, job: str, of: dict[str, Any]) -> tuple[Any, list[wire.Array]]:
    talk = worker.talk()
    try:
        talk.ask(job, **of)
        answer = talk.hear()
    except CdtError:
        worker.keep(talk)
        raise
    except BaseException:
        talk.close()
        raise
    worker.keep(talk)
    return answer


def _as_error(subject: Subject, end: Ended) -> InputError:
    at = f" ({', '.join(end.at[:3])})" if end.at else ""
    more = f" and {counted(len(end.at) - 3, 'more')}" if len(end.at) > 3 else ""
    return subject.error(f"{subject.name}{at}{more}: {end.how}")


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
os.register_at_fork(after_in_child=SANDBOX.forget)
