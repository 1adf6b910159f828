"""ONNX Runtime on an NVIDIA GPU.

Every size of batch gets a session of its own with fixed shapes, whose arrays live on the device and
whose kernels are replayed as one CUDA graph. What does not change from call to call, such as a CT's
tokens and the prototypes, stays there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends.ort import CPU, CURE, load
from cdt_runtime.backends.session import Precision, failure
from cdt_runtime.backends.shapes import BATCH, Input, ShapedSession
from cdt_runtime.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
PROBE = {BATCH: 1, "classes": 2}
"""Sizes of the session that is opened first: it tells whether the GPU can be used at all."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}


class CudaSession(ShapedSession):
    """A graph on the first NVIDIA GPU.

    Args:
        graph: bytes of a single-file ONNX model.
        precision: `auto` lets float32 be rounded to TF32, `fp32` does not.
        provider: what runs it; another one is never used in its place.

    Raises:
        BackendError: there is no usable GPU; the CPU never stands in.
    """

    def __init__(self, graph: bytes, precision: Precision, provider: str = PROVIDER) -> None:
        self._graph, self._provider = graph, provider
        half = precision == "auto"
        self._settings: dict[str, str] = {}
        if provider == PROVIDER:
            # An exhaustive search of kernels would cost more at the start than it saves.
            self._settings = {
                "use_tf32": str(int(half)),
                "enable_cuda_graph": "1",
                "cudnn_conv_algo_search": "HEURISTIC",
            }
        # Once fixed, a dimension has lost its name: the free graph is asked, on the CPU.
        inputs = {
            one.name: Input(tuple(one.shape), np.dtype(_TYPES[one.type]))
            for one in load(graph, CPU).get_inputs()
        }
        super().__init__(inputs, provider, half)
        free = [d for one in inputs.values() for d in one.shape if isinstance(d, str)]
        sizes = {name: PROBE[name] for name in dict.fromkeys(free)}
        first = self._open(sizes)
        self._fixed[tuple(sizes.values())] = first
        self.engine = first.engine

    def _open(self, sizes: Mapping[str, int]) -> _Fixed:
        session = load(self._graph, self._provider, self._settings, sizes)
        device = "cuda" if self._provider == PROVIDER else "cpu"
        try:
            return _Fixed(session, self._batched, device)
        except Exception as error:  # as in `OrtSession.run`
            raise failure(self._provider, error, CURE) from error


class _Fixed:
    """A session of fixed shapes whose arrays live on the device.

    Args:
        session: of ONNX Runtime.
        batched: the inputs that have a row for each item of the batch.
        device: ONNX Runtime's name of where the arrays are.
    """

    def __init__(self, session: Any, batched: Sequence[str], device: str) -> None:
        import onnxruntime as ort

        self._session, self._binding = session, session.io_binding()
        self.engine = f"onnxruntime {ort.__version__} {session.get_providers()[0]}"
        self._names = [one.name for one in session.get_outputs()]
        inputs = session.get_inputs()
        self._values = {one.name: _on_device(one, device) for one in inputs}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for one in session.get_outputs():
            self._binding.bind_ortvalue_output(one.name, _on_device(one, device))
        self._batch = {
            one.name: np.zeros(one.shape, _TYPES[one.type]) for one in inputs if one.name in batched
        }
        self._held: dict[str, NDArray[Any]] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """Send what changed, run, and fetch the first `count` rows of each batched output."""
        for name, value in self._values.items():
            given = inputs[name]
            if name in self._batch:
                value.update_inplace(self._filled(name, given, count))
            elif not np.array_equal(self._held.get(name, _NOTHING), given):
                value.update_inplace(np.ascontiguousarray(given))
                self._held[name] = given.copy()
        self._session.run_with_iobinding(self._binding)
        outputs = self._binding.copy_outputs_to_cpu()
        return {
            name: np.array(output[:count] if self._batch else output)
            for name, output in zip(self._names, outputs, strict=True)
        }

    def _filled(self, name: str, given: NDArray[Any], count: int) -> NDArray[Any]:
        rows = self._batch[name]
        if len(rows) == count:
            return np.ascontiguousarray(given)
        rows[:count] = given
        return rows


_NOTHING = np.zeros(0)


def _on_device(argument: Any, device: str) -> Any:
    """An array of the shape and type of a session's input or output."""
    import onnxruntime as ort

    kind = _TYPES[argument.type]
    return ort.OrtValue.ortvalue_from_shape_and_type(argument.shape, kind, device, 0)


def cuda(graph: bytes, precision: Precision) -> CudaSession:
    """Load a graph on the first NVIDIA GPU.

    Raises:
        BackendError: there is no usable GPU.
    """
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        raise BackendError(f"backend 'cuda': this ONNX Runtime has no CUDA provider{CURE}")
    return CudaSession(graph, precision)
