"""Stands for a GPU, for pycuda and for the driver's library, where there is none.

The names and signatures are those of pycuda 2026.1 and of the driver. Work is done late: a copy or
a run takes place when its stream is waited for, and while a stream records nothing takes place at
all. `GPU.log` tells what was asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np


class Gpu:
    """A GPU that notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.depth = 0
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}

    def need(self) -> None:
        assert self.depth > 0, "no context is current"

    def reset(self) -> None:
        vars(self).update(vars(Gpu()))


GPU = Gpu()


# pycuda.driver


class Error(Exception):
    pass


class Stream:
    def __init__(self, flags: int = 0) -> None:
        GPU.need()
        assert flags == 1, "a stream that waits for the legacy one can't be recorded"
        self.handle = 0x7F00_0000_0000 + len(GPU.streams)  # does not fit 32 bits
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        GPU.streams[self.handle] = self

    def put(self, what: str, work: Callable[[], None]) -> None:
        GPU.need()
        if self.recording is not None:
            GPU.log.append(f"record {what}")
            self.recording.append(work)
        else:
            GPU.log.append(what)
            self.queue.append(work)

    def synchronize(self) -> None:
        GPU.need()
        assert self.recording is None, "waiting breaks a recording"
        GPU.log.append("wait")
        for work in self.queue:
            work()
        self.queue.clear()


class Context:
    def push(self) -> None:
        GPU.depth += 1

    @staticmethod
    def pop() -> None:
        GPU.depth -= 1


class Device:
    count_here = 1

    def __init__(self, number: int) -> None:
        assert number == 0

    @staticmethod
    def count() -> int:
        return Device.count_here

    def name(self) -> str:
        return "NVIDIA Fake"

    def compute_capability(self) -> tuple[int, int]:
        return 9, 0

    def retain_primary_context(self) -> Context:
        return Context()


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        GPU.need()
        self._address = 0x7E00_0000_0000 + 4096 * len(GPU.memory)
        GPU.memory[self._address] = np.zeros(size, np.uint8)

    def __int__(self) -> int:
        return self._address


def init(flags: int = 0) -> None:
    GPU.log.append("init")


def get_driver_version() -> int:
    return 13000


def mem_alloc(bytes: int) -> DeviceAllocation:
    return DeviceAllocation(bytes)


def pagelocked_empty(
    shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0
) -> np.ndarray[Any, Any]:
    GPU.need()
    values = np.empty(shape, dtype)
    values.view(np.uint8)[...] = 0xA5  # whatever was there
    return values


def memcpy_htod_async(dest: DeviceAllocation, src: Any, stream: Any = None) -> None:
    def copy() -> None:
        GPU.memory[int(dest)][...] = src.reshape(-1).view(np.uint8)

    stream.put(f"send {src.dtype} {list(src.shape)}", copy)


def memcpy_dtoh_async(dest: Any, src: DeviceAllocation, stream: Any = None) -> None:
    def copy() -> None:
        dest.reshape(-1).view(np.uint8)[...] = GPU.memory[int(src)]

    stream.put(f"fetch {dest.dtype} {list(dest.shape)}", copy)


# The driver's library


class Driver:
    """Its calls, with the handles and pointers that ctypes passes."""

    def __init__(self) -> None:
        self.code = 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert mode == 1
        GPU.log.append("begin")
        GPU.streams[stream.value].recording = []
        return self.code

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        GPU.log.append("end")
        recording = GPU.streams[stream.value].recording
        assert recording is not None
        GPU.streams[stream.value].recording = None
        return self._put(graph, recording)

    def cuGraphInstantiateWithFlags(self, replay: Any, graph: Any, flags: int) -> int:
        assert flags == 0
        return self._put(replay, GPU.graphs[graph.value])

    def cuGraphLaunch(self, replay: Any, stream: Any) -> int:
        GPU.log.append("replay")
        GPU.streams[stream.value].queue.extend(GPU.graphs[replay.value])
        return self.code

    def cuGraphDestroy(self, graph: Any) -> int:
        del GPU.graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, replay: Any) -> int:
        GPU.log.append("forget")
        GPU.graphs.pop(replay.value, None)
        return 0

    def _put(self, place: Any, work: list[Callable[[], None]]) -> int:
        handle = 0x7D00_0000_0000 + len(GPU.log) * 16 + len(GPU.graphs)
        GPU.graphs[handle] = [*work]
        ctypes.cast(place, ctypes.POINTER(ctypes.c_void_p))[0] = handle
        return self.code


NAMED = (
    *(Error, Stream, Device, init, get_driver_version, mem_alloc),
    *(pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async),
)


def named(module: str, members: tuple[Any, ...], **values: str) -> ModuleType:
    """A module that holds only what is listed, so that a wrong name fails."""
    found = ModuleType(module)
    found.__spec__ = ModuleSpec(module, None)
    vars(found).update({one.__name__: one for one in members}, **values)
    return found


def modules() -> dict[str, ModuleType]:
    """What stands in `sys.modules`."""
    return {"pycuda": named("pycuda", ()), "pycuda.driver": named("pycuda.driver", NAMED)}
