"""Stands for TensorRT where it can't run: the same names, signatures and order.

What this module accepts the real bindings accept: `test_trt_api.py` holds each signature against
them. ONNX Runtime computes the answers, on the memory of the stand-in for the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any

import numpy as np
from fake_cuda import GPU, named

KINDS = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(float16)": "float16"}

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


def modules() -> dict[str, ModuleType]:
    """What stands in `sys.modules`."""
    return {"tensorrt": named("tensorrt", NAMED, __version__=__version__)}
