"""ONNX Runtime on the CPU, and on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray

from cdt_runtime.backends.session import Precision, first_line
from cdt_runtime.errors import BackendError

PACKAGES = ("onnxruntime-gpu", "onnxruntime")
"""Distributions that provide it; never both."""

DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu")
"""What a Linux machine with an NVIDIA driver has; the second on a Jetson."""


class OrtSession:
    """A graph in ONNX Runtime on exactly one execution provider.

    Args:
        graph: bytes of a single-file ONNX model.
        provider: the execution provider; another one is never used in its place.
        **settings: of the provider.
    """

    def __init__(self, graph: bytes, provider: str, **settings: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        ort.set_default_logger_severity(4)  # what goes wrong is in the exception, in one line
        # Spinning threads double the time where other work shares the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = ort.InferenceSession(graph, options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime raises a bare class of its own for each status
            raise BackendError(
                f"{provider}: can't load the graph: {_reason(error)}{_cure(provider)}"
            ) from error
        actual = self._session.get_providers()[0]
        if actual != provider:
            raise BackendError(
                f"{provider} was asked for, ONNX Runtime gives {actual}{_cure(provider)}"
            )
        self.engine = f"onnxruntime {ort.__version__} {actual}"
        self.half = False
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Raises:
            BackendError: the engine refused the inputs or ran out of memory.
        """
        try:
            outputs = self._session.run(self._names, dict(inputs))
        except Exception as error:  # as above
            raise BackendError(f"{self.engine}: {first_line(error)}") from error
        return dict(zip(self._names, outputs, strict=True))


def cpu(graph: bytes, precision: Precision) -> OrtSession:
    """Load a graph on the CPU, where it computes in the graph's own precision."""
    return OrtSession(graph, "CPUExecutionProvider")


def cuda(graph: bytes, precision: Precision) -> OrtSession:
    """Load a graph on the first NVIDIA GPU; float32 may be rounded to TF32 unless forbidden.

    Raises:
        BackendError: there is no usable GPU; the CPU never stands in.
    """
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(f"backend 'cuda': this ONNX Runtime has no CUDA provider{_cure('CUDA')}")
    rounded = precision == "auto"
    session = OrtSession(graph, "CUDAExecutionProvider", use_tf32=str(int(rounded)))
    session.half = rounded
    return session


def gpu_present() -> bool:
    """Whether there is a driver of an NVIDIA GPU."""
    if sys.platform == "win32":
        from ctypes.util import find_library

        return find_library("nvcuda") is not None
    return any(os.path.exists(path) for path in DRIVERS) and find_spec("onnxruntime") is not None


def _cure(provider: str) -> str:
    if provider == "CPUExecutionProvider":
        return ""
    return (
        ": check the GPU and its driver and pip install 'cdt-edge[gpu]', or use "
        "--backend onnxruntime"
    )


def _reason(error: Exception) -> str:
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return "no usable GPU, or its libraries are missing"
    return first_line(error)
