"""TensorRT's Python package: found, checked, and made to say what goes wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

from cdt_runtime.backends.device import unloadable
from cdt_runtime.errors import BackendError

MAJORS = (10, 11)
"""Versions whose names and signatures are those that are called here."""


def load_tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        BackendError: it is missing, can't be loaded, or is of an unknown version.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise unloadable("tensorrt", error) from error
    if int(tensorrt.__version__.split(".")[0]) not in MAJORS:
        known = " or ".join(map(str, MAJORS))
        raise BackendError(
            f"backend 'tensorrt': TensorRT {tensorrt.__version__} is installed, {known} is needed: "
            f"pip install 'cdt-edge[tensorrt]'"
        )
    return tensorrt


@cache
def logger() -> Any:
    """The one logger of the process, which keeps the last error; TensorRT ignores any later one."""
    trt = load_tensorrt()
    wrong = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # a class of an optional package
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, msg: str) -> None:
            if severity in wrong:
                self.last = msg

    return Log()


def made(kind: Any, *arguments: Any) -> Any:
    """Make one of TensorRT's objects; only where there is a GPU, or the process may crash.

    Raises:
        BackendError: TensorRT can't.
    """
    try:
        return kind(*arguments)
    except TypeError as error:  # how the bindings tell that there is none
        raise BackendError(f"TensorRT can't start: {_last_error()}") from error


def require(done: Any, what: str) -> Any:
    """Return what TensorRT gave; where it failed that is None or False, and its log says why.

    Raises:
        BackendError: with the last line of that log.
    """
    if done is None or done is False:
        raise BackendError(f"TensorRT can't {what}: {_last_error()}")
    return done


def _last_error() -> str:
    return " ".join(logger().last.split())[:300]
