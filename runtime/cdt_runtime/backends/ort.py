"""ONNX Runtime on the CPU, and what its providers have in common."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray

from cdt_runtime.backends.session import Precision, failure, first_line
from cdt_runtime.errors import BackendError

CPU = "CPUExecutionProvider"
CURE = (
    ": check the GPU and its driver and pip install 'cdt-edge[gpu]', or use --backend onnxruntime"
)

PACKAGES = ("onnxruntime-gpu", "onnxruntime")
"""Distributions that provide it; never both."""

DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu")
"""What a Linux machine with an NVIDIA driver has; the second on a Jetson."""


class OrtSession:
    """A graph on the CPU.

    Args:
        graph: bytes of a single-file ONNX model.
    """

    half = False

    def __init__(self, graph: bytes) -> None:
        import onnxruntime as ort

        self._session = load(graph, CPU)
        self.engine = f"onnxruntime {ort.__version__} {CPU}"
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Raises:
            BackendError: the engine refused the inputs or ran out of memory.
        """
        try:
            outputs = self._session.run(self._names, dict(inputs))
        except Exception as error:  # ONNX Runtime raises a bare class of its own for each status
            raise failure(self.engine, error) from error
        return dict(zip(self._names, outputs, strict=True))


def cpu(graph: bytes, precision: Precision) -> OrtSession:
    """Load a graph on the CPU, where it computes in the graph's own precision."""
    return OrtSession(graph)


def load(
    graph: bytes,
    provider: str,
    settings: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """Open ONNX Runtime's session of a graph on exactly one execution provider.

    Args:
        graph: bytes of a single-file ONNX model.
        provider: the execution provider; another one is never used in its place.
        settings: of the provider.
        sizes: of free dimensions, by name; the others stay free.

    Raises:
        BackendError: the provider can't run the graph here.
    """
    import onnxruntime as ort

    cure = "" if provider == CPU else CURE
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.set_default_logger_severity(4)  # what goes wrong is in the exception, in one line
    # Spinning threads double the time where other work shares the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if provider != CPU:
        _load_cuda()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(
            graph, options, providers=[(provider, dict(settings or {}))], enable_fallback=0
        )
    except Exception as error:  # as in `OrtSession.run`
        raise BackendError(f"{provider}: can't load the graph: {_reason(error, cure)}") from error
    actual = session.get_providers()[0]
    if actual != provider:
        raise BackendError(f"{provider} was asked for, ONNX Runtime gives {actual}{cure}")
    return session


def gpu_present() -> bool:
    """Whether there is a driver of an NVIDIA GPU."""
    if sys.platform == "win32":
        from ctypes.util import find_library

        return find_library("nvcuda") is not None
    return any(os.path.exists(path) for path in DRIVERS) and find_spec("onnxruntime") is not None


@cache
def _load_cuda() -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, where the system's loader does not look.

    What can't be loaded is named on stdout, without which a provider says why it does not run.
    """
    import onnxruntime as ort

    with redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _reason(error: Exception, cure: str) -> str:
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return f"no usable GPU, or its libraries are missing{cure}"
    if "have not been partitioned" in str(error):
        return (
            "it holds operators that only a CPU computes, as graphs of --int8 do: export with "
            "--fp16, or use --backend onnxruntime"
        )
    return f"{first_line(error)}{cure}"
