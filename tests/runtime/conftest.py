"""A machine with a GPU, TensorRT and pycuda, as far as names go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest

from cdt_runtime.backends import device, ort, trt_library


@pytest.fixture
def driver(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path
) -> Iterator[fake_cuda.Driver]:
    """The stand-ins in place of pycuda, TensorRT and the driver's library, which is returned."""
    fake_cuda.GPU.reset()
    for name, module in {**fake_cuda.modules(), **fake_tensorrt.modules()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ort, "DRIVERS", (str(tmp_path),))
    found = fake_cuda.Driver()
    monkeypatch.setattr(device, "_driver", lambda: found)
    once_a_process = (device.first_device, trt_library.logger)
    for one in once_a_process:
        one.cache_clear()
    yield found
    for one in once_a_process:
        one.cache_clear()
    assert fake_cuda.GPU.depth == 0  # pycuda would end the process
