"""ONNX Runtime on the CPU, and on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from cdt_runtime.errors import BackendError


class OrtSession:
    """A graph in ONNX Runtime on exactly one execution provider.

    Args:
        graph: bytes of a single-file ONNX model.
        provider: the execution provider; another one is never used in its place.
    """

    def __init__(self, graph: bytes, provider: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        ort.set_default_logger_severity(4)  # what goes wrong is in the exception, in one line
        # Spinning threads double the time where other work shares the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = ort.InferenceSession(graph, options, providers=[provider])
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
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Raises:
            BackendError: the engine refused the inputs or ran out of memory.
        """
        try:
            outputs = self._session.run(self._names, dict(inputs))
        except Exception as error:  # as above
            raise BackendError(f"{self.engine}: {_first_line(error)}") from error
        return dict(zip(self._names, outputs, strict=True))


def cpu(graph: bytes) -> OrtSession:
    """Load a graph on the CPU."""
    return OrtSession(graph, "CPUExecutionProvider")


def cuda(graph: bytes) -> OrtSession:
    """Load a graph on the first NVIDIA GPU.

    Raises:
        BackendError: there is no usable GPU; the CPU never stands in.
    """
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(f"backend 'cuda': this ONNX Runtime has no CUDA provider{_cure('CUDA')}")
    return OrtSession(graph, "CUDAExecutionProvider")


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
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
