"""Whatever a decoder does, its caller gets a result or one input error; nothing else fails."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdt_runtime.errors import InputError, TileError
from cdt_runtime.sandbox import process
from cdt_runtime.sandbox.process import Sandbox, Subject

SUBJECT = Subject("odd.tif", TileError)

MISDEEDS = """
import ctypes, os, sys, threading, time
sys.path[:] = sys.argv[3:]
import numpy as np
from cdt_runtime.sandbox import jobs, limits, place
limits.MEMORY = 1 << 30


class Panic(BaseException):
    pass


def misdeed(act):
    def job(talk, seconds=0.5):
        talk.expect(seconds)
        with talk.limits.granted(seconds):
            talk.say(act())
    return job


def panic():
    raise Panic("a patient's name")


def odd():
    return [].pop()


def spin():
    while True:
        pass


def grow():
    return len([np.ones(1 << 27) for _ in range(64)])


def write():
    with open(os.path.join(os.environ.get("TMPDIR", "/tmp"), f"cdt-{os.getpid()}"), "w") as file:
        os.unlink(file.name)
        file.write("x" * 100000)


def many():
    return len([open("/dev/null") for _ in range(2000)])


def in_a_file():
    with place.at("file 3 of 9"):
        os.abort()


jobs.JOBS.update(
    good=misdeed(lambda: "good"),
    late=misdeed(lambda: time.sleep(0.3) or "good"),
    abort=misdeed(os.abort),
    segv=misdeed(lambda: ctypes.string_at(0)),
    leave=misdeed(lambda: os._exit(0)),
    panic=misdeed(panic),
    odd=misdeed(odd),
    spin=misdeed(spin),
    sleep=misdeed(lambda: time.sleep(60)),
    grow=misdeed(grow),
    write=misdeed(write),
    many=misdeed(many),
    in_a_file=misdeed(in_a_file),
    environment=misdeed(lambda: dict(os.environ)),
    pid=misdeed(os.getpid),
)
from cdt_runtime.sandbox.worker import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setattr(process, "_START", MISDEEDS)
    monkeypatch.setattr(process, "WALL_S", 2.0)
    monkeypatch.setattr(process, "WALL_PER_CPU", 2.0)
    box = Sandbox()
    yield box
    box.close()


def good(sandbox: Sandbox) -> bool:
    return bool(sandbox.ask(SUBJECT, "good")[0] == "good")


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("abort", r"odd\.tif: its decoder crashed \(SIGABRT\): it is damaged: fetch it again"),
        ("segv", r"odd\.tif: its decoder crashed \(SIGSEGV\)"),
        ("leave", r"odd\.tif: the decoding process ended \(exit code 0\)"),
        (
            "panic",
            r"odd\.tif: its decoder failed \(Panic in worker\.py, line \d+\): the file is dam",
        ),
        ("odd", r"odd\.tif: its decoder failed \(IndexError in worker\.py, line \d+\)"),
        ("spin", r"odd\.tif: decoding it takes longer than any sound file of its size"),
        ("sleep", r"odd\.tif: no answer from its decoder in 3 s: check the disk"),
        ("grow", r"odd\.tif: decoding it takes over 4 GiB of memory: crop it"),
        ("write", r"odd\.tif: its decoder failed \(OSError in worker\.py, line \d+\)"),
        ("many", r"odd\.tif: its decoder failed \(OSError in worker\.py, line \d+\)"),
        ("in_a_file", r"odd\.tif \(file 3 of 9\): its decoder crashed \(SIGABRT\)"),
    ],
)
def test_every_end_is_one_error_that_names_the_file(sandbox: Sandbox, job: str, said: str) -> None:
    assert good(sandbox)
    started = time.monotonic()
    with pytest.raises(TileError, match=rf"^{said}") as caught:
        sandbox.ask(SUBJECT, job)
    assert "\n" not in str(caught.value)
    assert "patient" not in str(caught.value)
    assert time.monotonic() - started < 10
    assert good(sandbox)


@pytest.mark.parametrize("job", ["abort", "spin", "grow", "sleep"])
def test_what_runs_beside_a_crash_is_not_lost(sandbox: Sandbox, job: str) -> None:
    def ask(one: str) -> str:
        try:
            return str(sandbox.ask(Subject(one, TileError), one)[0])
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, ["late", "late", job, "late", "late", "good"]))
    assert [found[at] for at in (0, 1, 3, 4, 5)] == ["good"] * 5
    assert found[2].startswith(f"{job}: ")


def test_a_crash_ends_a_conversation_with_an_error(sandbox: Sandbox) -> None:
    def converse() -> None:
        with sandbox.conversation(SUBJECT) as talk:
            talk.ask("abort")
            talk.hear()

    with pytest.raises(TileError, match=r"^odd\.tif: its decoder crashed"):
        converse()
    assert good(sandbox)


def test_one_process_serves_until_it_fails(sandbox: Sandbox) -> None:
    first = {sandbox.ask(SUBJECT, "pid")[0] for _ in range(5)}
    assert len(first) == 1
    os.kill(first.copy().pop(), signal.SIGKILL)  # between two questions: nobody need know
    assert sandbox.ask(SUBJECT, "pid")[0] not in first
    assert len({sandbox.ask(SUBJECT, "pid")[0] for _ in range(5)}) == 1


def test_it_is_told_no_secrets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    told = sandbox.ask(SUBJECT, "environment")[0]
    assert "TOKEN" not in told
    assert "PATH" in told


def test_what_it_sends_is_held_against_its_memory() -> None:
    from cdt_runtime.sandbox import wire

    descriptor, room = wire.make_room(64)
    os.close(descriptor)
    lies = [
        {"dtype": "float32", "shape": [17], "at": 0},
        {"dtype": "float32", "shape": [16], "at": 4},
        {"dtype": "float32", "shape": [1], "at": -4},
        {"dtype": "object", "shape": [1], "at": 0},
        {"dtype": "uint8", "shape": [-1], "at": 0},
        {"dtype": "uint8", "shape": [1.0], "at": 0},
    ]
    assert wire.take([{"dtype": "float32", "shape": [16], "at": 0}], room)[0].shape == (16,)
    for lie in lies:
        with pytest.raises(wire.Closed):
            wire.take([lie], room)
    with pytest.raises(wire.Closed):
        wire.take([{"dtype": "uint8", "shape": [1], "at": 0}], None)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_does_not_outlive_its_caller(end: int, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "tile.png")
    code = textwrap.dedent(f"""
        import signal, time
        from cdt_runtime.reading import SANDBOX, read_tile
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        read_tile({str(tmp_path / "tile.png")!r})
        print(SANDBOX._worker._process.pid, flush=True)
        time.sleep(60)
    """)
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert caller.stdout is not None
    with caller.stdout:
        pid = int(caller.stdout.readline())
    assert alive(pid)
    caller.send_signal(end)
    caller.wait(10)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_forked_process_has_one_of_its_own(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "tile.png")
    code = textwrap.dedent(f"""
        import os, sys
        from cdt_runtime.reading import SANDBOX, read_tile
        path = {str(tmp_path / "tile.png")!r}
        read_tile(path)
        own = SANDBOX._worker._process.pid
        if os.fork() == 0:
            read_tile(path)
            ok = SANDBOX._worker._process.pid != own
            SANDBOX.close()
            os._exit(0 if ok else 1)
        _, status = os.wait()
        read_tile(path)
        assert SANDBOX._worker._process.pid == own
        sys.exit(os.waitstatus_to_exitcode(status))
    """)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_nothing_is_left_open(tmp_path: Path) -> None:
    from cdt_runtime.reading import read_tile

    path = tmp_path / "tile.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)

    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    read_tile(path)
    before = opened()
    for _ in range(50):
        read_tile(path)
        with pytest.raises(TileError):
            read_tile(tmp_path / "none.png")
    assert opened() <= before  # what other tests left may be gone by now


def ways_to_read(path: Path, folder: Path) -> Iterator[Callable[[], object]]:
    """Read a file as a tile, as a slide and as a series."""
    from cdt_runtime.reading import open_slide, read_series, read_tile

    def slide() -> None:
        with open_slide(path) as opened:
            opened.small_copy(0)

    def series() -> None:
        shutil.copy(path, folder / "one")
        read_series(folder, min_slices=1)

    yield from (lambda: read_tile(path), slide, series)


def test_real_odd_and_malformed_files_are_read_or_refused(real_data: Path, tmp_path: Path) -> None:
    folders = ("tiff_odd", "tiff_malformed", "dicom_odd", "dicom_malformed", "mif", "pathology")
    files = sorted(path for name in folders for path in (real_data / name).rglob("*"))
    read, said = 0, []
    for path in filter(Path.is_file, files):
        for act in ways_to_read(path, tmp_path):
            started = time.monotonic()
            try:
                act()
                read += 1
            except InputError as error:
                said.append(str(error))
            assert time.monotonic() - started < 10
    assert [one for one in said if "\n" in one or "its decoder" in one] == []
    assert (read > 60, len(said) > 100) == (True, True)
