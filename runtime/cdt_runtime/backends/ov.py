"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends.session import Precision, failure, first_line
from cdt_runtime.cache import cache_dir
from cdt_runtime.errors import BackendError


class OpenVinoSession:
    """A graph in OpenVINO on the CPU.

    Args:
        graph: bytes of a single-file ONNX model.
        precision: `auto` lets it compute in bfloat16 where the CPU knows that, `fp32` never.
    """

    def __init__(self, graph: bytes, precision: Precision) -> None:
        hints = {"PERFORMANCE_HINT": "LATENCY"}
        if precision == "fp32":
            hints["INFERENCE_PRECISION_HINT"] = "f32"
        core, version = _core()
        try:
            compiled = core.compile_model(core.read_model(graph), "CPU", hints)
            kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise BackendError(f"openvino: can't load the graph: {first_line(error)}") from error
        self.half = kind != "f32"
        self.engine = f"openvino {version} CPU {kind}"
        self._names = [tuple(output.get_names()) for output in compiled.outputs]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Raises:
            BackendError: the engine refused the inputs or ran out of memory.
        """
        try:
            found = self._request.infer(dict(inputs), share_inputs=True)
        except (RuntimeError, TypeError) as error:
            raise failure(self.engine, error) from error
        # The request's buffers are used again by the next call.
        outputs = [np.array(found[index]) for index in range(len(self._names))]
        return {
            name: output
            for names, output in zip(self._names, outputs, strict=True)
            for name in names
        }


def cpu(graph: bytes, precision: Precision) -> OpenVinoSession:
    """Load a graph on the CPU.

    Raises:
        BackendError: OpenVINO is not installed, or can't run the graph.
    """
    return OpenVinoSession(graph, precision)


def present() -> bool:
    """Whether it is installed."""
    return find_spec("openvino") is not None


@cache
def _core() -> tuple[Any, str]:
    """One core a process: it owns the threads. Compiled graphs are kept on disk."""
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            "backend 'openvino': openvino is not installed: pip install 'cdt-edge[openvino]', or "
            "use --backend onnxruntime"
        ) from error
    core, folder = openvino.Core(), cache_dir()
    if folder is not None:
        with suppress(RuntimeError, OSError):  # a folder that can't be written only costs time
            folder.mkdir(parents=True, exist_ok=True)
            core.set_property({"CACHE_DIR": str(folder / "openvino")})
    return core, openvino.__version__.partition("-")[0]
