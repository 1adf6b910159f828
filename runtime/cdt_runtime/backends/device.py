"""The GPU: its context, streams, memory, and work that is recorded and replayed.

All that is known of pycuda is in this file. CUDA graphs, which pycuda does not offer, come from the
driver's own library.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends.session import first_line
from cdt_runtime.errors import BackendError

CURE = (
    ": check the GPU and its driver and pip install 'cdt-edge[tensorrt]', or use another --backend"
)

LIBRARY = "libcuda.so.1"
"""The driver's library; it comes with the driver."""

NON_BLOCKING = 1
"""Flag of a stream that does not wait for the legacy one: that would break a recording."""

THREAD_LOCAL = 1
"""What other threads do on the GPU does not break a recording."""

_HANDLE, _OUT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
CALLS: dict[str, tuple[Any, ...]] = {
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, _HANDLE, ctypes.c_ulonglong),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphExecDestroy": (_HANDLE,),
}
"""What is called of the driver, and with what; each returns 0 or the number of an error."""


class Device:
    """The first NVIDIA GPU.

    Its primary context is the one that TensorRT uses too. It is current inside `current` only:
    pycuda ends the process if a context is left current when that exits.

    Args:
        cuda: the module `pycuda.driver`.

    Raises:
        BackendError: there is no GPU, or it can't be used.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        try:
            cuda.init()
            if not cuda.Device.count():
                raise BackendError(f"backend 'tensorrt': no NVIDIA GPU{CURE}")
            device = cuda.Device(0)
            major, minor = device.compute_capability()
            self.name = f"{device.name()} (compute {major}.{minor})"
            self.driver = int(cuda.get_driver_version())
            self._context = device.retain_primary_context()
        except cuda.Error as error:
            raise BackendError(
                f"backend 'tensorrt': no usable GPU: {first_line(error)}{CURE}"
            ) from error

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU that of this thread; all that uses or frees it belongs inside."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def stream(self) -> Any:
        """Open a queue of work."""
        return self._cuda.Stream(NON_BLOCKING)

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Reserve an array on the host and its twin on the device."""
        return Buffer(self._cuda, shape, dtype)


class Buffer:
    """An array on the host, pinned so that it is copied at full speed, and its twin on the device.

    Args:
        cuda: the module `pycuda.driver`.
        shape: of the array.
        dtype: of the array.

    Attributes:
        host: the array; its content is arbitrary at first.
        address: of the twin.
    """

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._cuda = cuda
        self.host: NDArray[Any] = cuda.pagelocked_empty(shape, np.dtype(dtype))
        self._memory = cuda.mem_alloc(int(self.host.nbytes))
        self.address = int(self._memory)

    def send(self, stream: Any) -> None:
        """Queue a copy from the host to the device."""
        self._cuda.memcpy_htod_async(self._memory, self.host, stream)

    def fetch(self, stream: Any) -> None:
        """Queue a copy from the device to the host."""
        self._cuda.memcpy_dtoh_async(self.host, self._memory, stream)


class Recording:
    """Work that is recorded once and then replayed as one CUDA graph.

    Args:
        stream: that `Device.stream` gave.
        work: queues it on the stream; it is not carried out meanwhile.

    Raises:
        BackendError: the driver can't record or replay it.
    """

    def __init__(self, stream: Any, work: Callable[[], None]) -> None:
        self._queue = _HANDLE(stream.handle)
        graph, replay = _HANDLE(), _HANDLE()
        _call("cuStreamBeginCapture_v2", self._queue, THREAD_LOCAL)
        try:
            work()
        finally:  # else the stream stays unusable
            ended = _driver().cuStreamEndCapture(self._queue, ctypes.byref(graph))
        _require("cuStreamEndCapture", ended)
        try:
            _call("cuGraphInstantiateWithFlags", ctypes.byref(replay), graph, 0)
        finally:
            _driver().cuGraphDestroy(graph)
        self._replay = replay
        weakref.finalize(self, _driver().cuGraphExecDestroy, replay)

    def launch(self) -> None:
        """Queue all of it, in one call."""
        _call("cuGraphLaunch", self._replay, self._queue)


@cache
def first_device() -> Device:
    """Open the GPU, once a process.

    Raises:
        BackendError: pycuda or the driver is missing, or the GPU can't be used.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise unloadable("pycuda", error) from error
    return Device(cuda)


def unloadable(package: str, error: ImportError) -> BackendError:
    """Say that a package is missing, or what it misses itself."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return BackendError(
            f"backend 'tensorrt': {package} is not installed: pip install 'cdt-edge[tensorrt]', or "
            f"use another --backend"
        )
    return BackendError(f"backend 'tensorrt': {package} can't be loaded: {first_line(error)}{CURE}")


@cache
def _driver() -> Any:
    library = ctypes.CDLL(LIBRARY)
    for name, arguments in CALLS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def _call(name: str, *arguments: Any) -> None:
    _require(name, getattr(_driver(), name)(*arguments))


def _require(name: str, code: int) -> None:
    if code:
        raise BackendError(f"the CUDA driver refuses {name}: error {code}")
