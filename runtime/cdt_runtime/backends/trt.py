"""TensorRT on an NVIDIA GPU, from plans that were built before.

Every size of batch gets a context of its own with fixed shapes. Its copies and kernels are recorded
once and replayed as one CUDA graph, between pinned arrays on the host. What does not change from
call to call, such as a CT's tokens and the prototypes, stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends.device import Buffer, Device, Recording, first_device
from cdt_runtime.backends.ort import gpu_present
from cdt_runtime.backends.session import Arrays, Precision, failure
from cdt_runtime.backends.shapes import BATCH, ShapedSession
from cdt_runtime.backends.trt_build import LARGEST_BATCH
from cdt_runtime.backends.trt_library import load_tensorrt, logger, made, require
from cdt_runtime.backends.trt_plan import BUILD, find_target, read_plan
from cdt_runtime.bundle import sha256

PACKAGES = ("tensorrt", "pycuda")


class TensorRtSession(ShapedSession):
    """A graph on the first NVIDIA GPU, in exactly the types that the graph names.

    Args:
        graph: bytes of a single-file ONNX model.

    Raises:
        BackendError: there is no usable GPU, or no plan of the graph for it; none is built here.
    """

    def __init__(self, graph: bytes) -> None:
        target = find_target()
        plan = read_plan(sha256(graph), target)
        super().__init__(plan.inputs, f"tensorrt {target.tensorrt} {target.gpu}", half=False)
        self._device = first_device()
        with self._device.current():
            self._runtime = made(load_tensorrt().Runtime, logger())
            self._loaded = self._runtime.deserialize_cuda_engine(plan.engine)
        require(self._loaded, f"load its plan ({BUILD})")

    def _run(self, inputs: Arrays, sizes: dict[str, int]) -> dict[str, NDArray[Any]]:
        count, parts = sizes.get(BATCH, 1), []
        with self._device.current():
            for start in range(0, count, LARGEST_BATCH):
                rows = slice(start, start + LARGEST_BATCH)
                some = {**inputs, **{name: inputs[name][rows] for name in self._batched}}
                left = min(LARGEST_BATCH, count - start)
                free = {**sizes, BATCH: left} if BATCH in sizes else sizes
                parts.append(super()._run(some, free))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _open(self, sizes: Mapping[str, int]) -> _Fixed:
        shapes = {
            name: tuple(size if isinstance(size, int) else sizes[size] for size in one.shape)
            for name, one in self._inputs.items()
        }
        single = sizes.get(BATCH, 1) == 1
        profile = (0 if single else 1) if sizes else None
        try:
            return _Fixed(self._loaded, self._device, shapes, self._batched, profile)
        except Exception as error:  # of TensorRT, of pycuda or of the driver
            raise failure(self.engine, error) from error


class _Fixed:
    """A context of fixed shapes with its arrays and the recording of its work.

    Args:
        engine: of TensorRT.
        device: the GPU.
        shapes: of the inputs.
        batched: the inputs that have a row for each item of the batch.
        profile: which of the plan's; None where it has none.
    """

    def __init__(
        self,
        engine: Any,
        device: Device,
        shapes: Mapping[str, tuple[int, ...]],
        batched: list[str],
        profile: int | None,
    ) -> None:
        self._batched, self._stream = batched, device.stream()
        self._context = require(engine.create_execution_context(), "make a context")
        if profile is not None:
            chosen = self._context.set_optimization_profile_async(profile, self._stream.handle)
            require(chosen, f"use profile {profile}")
        for name, shape in shapes.items():
            require(self._context.set_input_shape(name, shape), f"take {name} {list(shape)}")
        self._inputs, self._outputs = self._bound(engine, device)
        self._sent: set[str] = set()
        self._work()  # shapes are settled by a first run, which can't be recorded
        self._stream.synchronize()
        self._recording = Recording(self._stream, self._work)

    def _bound(self, engine: Any, device: Device) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Reserve the arrays of all inputs and outputs, and tell TensorRT where they are."""
        trt = load_tensorrt()
        inputs: dict[str, Buffer] = {}
        outputs: dict[str, Buffer] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = tuple(self._context.get_tensor_shape(name))
            buffer = device.buffer(shape, trt.nptype(engine.get_tensor_dtype(name)))
            require(self._context.set_tensor_address(name, buffer.address), f"bind {name}")
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = buffer
        return inputs, outputs

    def _work(self) -> None:
        """Queue what each call does."""
        for name in self._batched:
            self._inputs[name].send(self._stream)
        require(self._context.execute_async_v3(self._stream.handle), "run the plan")
        for buffer in self._outputs.values():
            buffer.fetch(self._stream)

    def run(self, inputs: Arrays, count: int) -> dict[str, NDArray[Any]]:
        """Send what changed, replay, and return the first `count` rows of each batched output."""
        for name, buffer in self._inputs.items():
            if name in self._batched:
                buffer.host[:count] = inputs[name]
            elif name not in self._sent or not np.array_equal(buffer.host, inputs[name]):
                buffer.host[...] = inputs[name]
                buffer.send(self._stream)
                self._sent.add(name)
        self.replay()
        rows = slice(count) if self._batched else slice(None)
        return {name: buffer.host[rows].copy() for name, buffer in self._outputs.items()}

    def replay(self) -> None:
        """Do the recorded work once more, on what the arrays hold, and wait for it."""
        self._recording.launch()
        self._stream.synchronize()


def tensorrt(graph: bytes, precision: Precision) -> TensorRtSession:
    """Load a graph's plan; either precision is exactly that of the graph.

    Raises:
        BackendError: there is no usable GPU, or no plan of the graph for it.
    """
    return TensorRtSession(graph)


def present() -> bool:
    """Whether there is a driver of an NVIDIA GPU, TensorRT and pycuda."""
    return gpu_present() and all(find_spec(package) is not None for package in PACKAGES)
