"""Inference engines behind one small protocol.

A backend turns the bytes of an ONNX graph into a session; a session runs named arrays. To add one,
write a module beside this file and one entry in `BACKENDS`. Which is fastest is measured, see
`proof.py`.
"""

from __future__ import annotations

from cdt_runtime.backends import ort, ort_cuda, ov, trt, trt_plan
from cdt_runtime.backends.session import Arrays, Backend, Precision, Session
from cdt_runtime.errors import BackendError
from cdt_runtime.onnx_scan import require_whole

__all__ = ["BACKENDS", "Arrays", "Backend", "Precision", "Session", "open_session"]

BACKENDS: dict[str, Backend] = {
    "tensorrt": Backend(trt.tensorrt, trt.present, trt.PACKAGES, trt_plan.built),
    "cuda": Backend(ort_cuda.cuda, ort.gpu_present, ort.PACKAGES),
    "openvino": Backend(ov.cpu, ov.present, ("openvino",)),
    "onnxruntime": Backend(ort.cpu, lambda: True, ort.PACKAGES),
}


def open_session(backend: str, graph: bytes, precision: Precision = "auto") -> Session:
    """Load a graph in the engine of that name.

    Raises:
        BackendError: no such engine, or it can't run here.
        BundleError: the graph is not in one file.
    """
    require_known(backend)
    require_whole(graph, "the graph")
    return BACKENDS[backend].open(graph, precision)


def require_known(backend: str) -> None:
    """Refuse a name that no engine has.

    Raises:
        BackendError: naming those there are.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}: expected one of auto, {', '.join(BACKENDS)}")
