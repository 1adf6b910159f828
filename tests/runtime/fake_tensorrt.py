"""Stands for TensorRT and pycuda where they can't run: the same names, signatures and order.

What this module accepts the real bindings accept: `test_trt_api.py` holds each signature against
them. Work is done by ONNX Runtime, late: a copy or a run takes place when its stream is waited for,
and while a stream records nothing takes place at all. `GPU.log` tells what was asked for.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

KINDS = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(float16)": "float16"}


class Gpu:
    """A GPU that notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.depth = 0
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.says: list[str] = []

    def need(self) -> None:
        assert self.depth > 0, "no context is current"


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


# tensorrt

__version__ = "11.4.0.106"


class BuilderFlag(Enum):
    TF32 = 0


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 0


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    pass


def _session(graph: bytes) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


class ITensor:
    def __init__(self, argument: Any) -> None:
        self._name, self._kind = argument.name, KINDS[argument.type]
        self._shape = argument.shape

    @property
    def name(self) -> str:
        return str(self._name)

    @property
    def dtype(self) -> Any:
        return self._kind

    @property
    def shape(self) -> list[int]:
        return [-1 if isinstance(size, str) else size for size in self._shape]

    def get_dimension_name(self, index: int) -> str:
        return str(self._shape[index])


class INetworkDefinition:
    _graph = b""
    _inputs: Sequence[ITensor] = ()

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes, path: str | None = None) -> bool:
        try:
            session = _session(model)
        except Exception:
            return False
        self._network._graph = model
        self._network._inputs = [ITensor(one) for one in session.get_inputs()]
        return True

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, index: int) -> ParserError:
        return ParserError("In node 3\nwith operator Odd: no importer")


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [[*min], [*opt], [*max]]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content + b"+")


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        GPU.log.append(f"clear {flag.name}")

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        GPU.log.append(f"timings {cache.content!r}")
        if cache.content.startswith(b"other"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        assert self._cache is not None
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        GPU.log.append(f"profile {json.dumps(profile.shapes)}")
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    _refuses = False

    def __init__(self, logger: ILogger) -> None:
        GPU.need()
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        GPU.log.append("build")
        if self._refuses:
            self._logger.log(ILogger.Severity.ERROR, "no kernel\nfor node 7")
            self._logger.log(ILogger.Severity.WARNING, "by the way")
            return None
        free = any(-1 in one.shape for one in network._inputs)
        assert bool(config.profiles) == free
        head = json.dumps([one.shapes for one in config.profiles])
        return IHostMemory(b"PLAN" + head.encode() + b"\0" + network._graph)


class IExecutionContext:
    def __init__(self, session: Any, profiles: list[Any]) -> None:
        self._session, self._profiles = session, profiles
        self._profile: dict[str, Any] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        GPU.log.append(f"use profile {profile_index}")
        self._profile = self._profiles[profile_index]
        return stream_handle in GPU.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None or not self._profiles
        if self._profile and name in self._profile:
            least, _, most = self._profile[name]
            if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        if name in self._shapes:
            return [*self._shapes[name]]
        sizes = {
            symbol: size
            for one in self._session.get_inputs()
            for symbol, size in zip(one.shape, self._shapes[one.name], strict=True)
        }
        (found,) = (one for one in self._session.get_outputs() if one.name == name)
        return [sizes.get(size, size) for size in found.shape]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory in GPU.memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        arguments = [*self._session.get_inputs(), *self._session.get_outputs()]
        if {one.name for one in arguments} != set(self._addresses):
            return False
        GPU.streams[stream_handle].put("execute", self._execute)
        return True

    def _execute(self) -> None:
        given = {
            one.name: GPU.memory[self._addresses[one.name]]
            .view(KINDS[one.type])
            .reshape(self._shapes[one.name])
            for one in self._session.get_inputs()
        }
        for one, values in zip(
            self._session.get_outputs(), self._session.run(None, given), strict=True
        ):
            GPU.memory[self._addresses[one.name]][...] = values.reshape(-1).view(np.uint8)


class ICudaEngine:
    def __init__(self, plan: bytes) -> None:
        head, _, graph = plan.removeprefix(b"PLAN").partition(b"\0")
        self._profiles, self._session = json.loads(head), _session(graph)
        self._arguments = {
            one.name: one for one in [*self._session.get_inputs(), *self._session.get_outputs()]
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self._arguments)

    def get_tensor_name(self, index: int) -> str:
        return [*self._arguments][index]

    def get_tensor_dtype(self, name: str) -> Any:
        return KINDS[self._arguments[name].type]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = [one.name for one in self._session.get_inputs()]
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def create_execution_context(self) -> IExecutionContext:
        GPU.need()
        GPU.log.append("context")
        return IExecutionContext(self._session, self._profiles)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        GPU.need()
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if serialized_engine.startswith(b"PLAN"):
            return ICudaEngine(serialized_engine)
        self._logger.log(ILogger.Severity.ERROR, "serialized with another version")
        return None


def nptype(trt_type: str) -> Any:
    return np.dtype(trt_type).type


NAMED = (
    *(BuilderFlag, NetworkDefinitionCreationFlag, TensorIOMode),
    *(ILogger, Builder, OnnxParser, Runtime, nptype),
)
"""What is reached by its name in the module, and can be made."""

GIVEN = (
    *(ITensor, INetworkDefinition, ParserError, IOptimizationProfile, ITimingCache),
    *(IBuilderConfig, IExecutionContext, ICudaEngine),
)
"""What only the others give."""

PYCUDA = (
    *(Error, Stream, Device, init, get_driver_version, mem_alloc),
    *(pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async),
)


def modules() -> dict[str, ModuleType]:
    """What stands in `sys.modules`: only what is listed here, so that a wrong name fails."""
    tensorrt, pycuda = ModuleType("tensorrt"), ModuleType("pycuda")
    driver = ModuleType("pycuda.driver")
    vars(tensorrt).update({one.__name__: one for one in NAMED}, __version__=__version__)
    vars(driver).update({one.__name__: one for one in PYCUDA})
    found = {one.__name__: one for one in (tensorrt, pycuda, driver)}
    for name, one in found.items():
        one.__spec__ = ModuleSpec(name, None)
    return found
