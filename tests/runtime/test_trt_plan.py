"""TensorRT's plans: how they are built, named and kept, and what is said where that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import GPU
from trt_cases import build, fixed_graph, small_graph

from cdt_runtime.backends import device, open_session, trt, trt_plan
from cdt_runtime.bundle import sha256
from cdt_runtime.errors import BackendError

pytestmark = pytest.mark.usefixtures("driver")

INSTALL = r"pip install 'cdt-edge\[tensorrt\]', or use another --backend$"


def test_a_plan_is_built_with_profiles_for_one_tile_and_for_batches() -> None:
    build(small_graph())
    one = {"tile": [[1, 3, 4, 4]] * 3, "prototypes": [[1, 3], [8, 3], [1024, 3]]}
    many = {**one, "tile": [[1, 3, 4, 4], [32, 3, 4, 4], [32, 3, 4, 4]]}
    assert GPU.log == [
        "init",
        "clear TF32",
        f"profile {json.dumps(one)}",
        f"profile {json.dumps(many)}",
        "timings b''",
        "build",
    ]


def test_a_graph_without_free_sizes_has_no_profile_and_needs_none() -> None:
    build(fixed_graph())
    assert not any("profile" in line for line in GPU.log)
    session = trt.TensorRtSession(fixed_graph())
    given = {"ct": np.array([[1, 2, 3, 4]], np.float32)}
    for sign in (1, -1):
        found = session.run({"ct": sign * given["ct"]})
        assert np.array_equal(found["ct_tokens"], -sign * given["ct"])
    assert not any("profile" in line for line in GPU.log)


def test_times_of_kernels_are_kept_and_used_again(cache_dir: Path) -> None:
    build(small_graph(), fixed_graph())
    (path,) = (cache_dir / "plans").glob("*.timings")
    assert path.read_bytes() == b"++"
    assert [line for line in GPU.log if "timings" in line] == ["timings b''", "timings b'+'"]
    path.write_bytes(b"other GPU")
    GPU.log.clear()
    build(small_graph())
    assert [line for line in GPU.log if "timings" in line] == [
        "timings b'other GPU'",
        "timings b''",
    ]
    assert path.read_bytes() == b"+"


def test_a_plan_is_keyed_by_graph_gpu_driver_and_version(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    (first,) = build(small_graph())
    assert build(small_graph()) == [first]
    found = {first, *build(small_graph(constant=3.0))}
    tensorrt, driver = sys.modules["tensorrt"], sys.modules["pycuda.driver"]
    for change in (
        lambda m: m.setattr(tensorrt, "__version__", "11.5.0"),
        lambda m: m.setattr(driver, "get_driver_version", lambda: 13010),
        lambda m: m.setattr(fake_cuda.Device, "name", lambda self: "NVIDIA Other"),
    ):
        with monkeypatch.context() as changed:
            change(changed)
            device.first_device.cache_clear()
            with pytest.raises(BackendError, match="no plan for this graph on"):
                trt.TensorRtSession(small_graph())
            found |= {*build(small_graph())}
    assert len(found) == 5
    assert {path.parent for path in found} == {cache_dir / "plans"}
    assert not [*(cache_dir / "plans").glob("*.partial")]
    head = json.loads(first.read_bytes().partition(b"\n")[0])
    assert head["inputs"] == {
        "tile": ["uint8", ["batch", 3, 4, 4]],
        "prototypes": ["float32", ["classes", 3]],
    }
    assert (head["graph"], head["gpu"]) == ("graph0", "NVIDIA Fake (compute 9.0)")


def test_a_plan_that_does_not_load_is_an_error_with_its_cure() -> None:
    (path,) = build(small_graph())
    head, _, plan = path.read_bytes().partition(b"\n")
    path.write_bytes(head + b"\n" + plan[:-1])
    with pytest.raises(BackendError, match=rf"{path.name} is damaged: build it with cdt-doctor"):
        trt.TensorRtSession(small_graph())
    for broken in (b"", b"{}\n", b"[1]\n", b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(BackendError, match="is damaged"):
            trt.TensorRtSession(small_graph())
    target = trt_plan.find_target()
    trt_plan.write_plan(path, trt_plan.Plan({}, b"odd"), {})
    expected = (
        r"TensorRT can't load its plan \(build it with cdt-doctor --build BUNDLE\): serialized with"
    )
    with pytest.raises(BackendError, match=expected):
        trt.TensorRtSession(small_graph())
    assert path == trt_plan.plan_path(path.parent, sha256(small_graph()), target)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            b"\x12\x04none",
            r"TensorRT can't read the graph: In node 3 with operator Odd: no importer$",
        ),
        (
            small_graph(tile="height"),
            "input tile: free dimension 'height': expected one of batch, classes",
        ),
    ],
)
def test_a_graph_that_can_not_be_built_is_one_error(graph: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        build(graph)


def test_why_a_plan_can_not_be_built_is_taken_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt.Builder, "_refuses", True)
    with pytest.raises(BackendError, match=r"TensorRT can't build a plan: no kernel for node 7$"):
        build(small_graph())


def test_an_int8_bundle_is_sent_back() -> None:
    expected = "some: a bundle in int8 is for CPUs: export one for TensorRT with cdt-export --fp16"
    with pytest.raises(BackendError, match=expected):
        build(small_graph(), precision="int8")


def test_a_cache_that_can_not_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"plans: can't be written \(.*\): set CDT_CACHE"):
        build(small_graph())
    monkeypatch.setattr(trt_plan, "cache_dir", lambda: None)
    with pytest.raises(BackendError, match="no cache folder for its plans: set CDT_CACHE"):
        build(small_graph())


def broken_init(flags: int = 0) -> None:
    raise fake_cuda.Error("cuInit failed: no device\nat line 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.setitem(sys.modules, "tensorrt", None),
            rf"tensorrt is not installed: {INSTALL}",
        ),
        (
            lambda m: m.setitem(sys.modules, "pycuda", None),
            rf"pycuda is not installed: {INSTALL}",
        ),
        (
            lambda m: m.setattr(sys.modules["tensorrt"], "__version__", "9.3.0"),
            r"TensorRT 9.3.0 is installed, 10 or 11 is needed: pip install 'cdt-edge\[tensorrt\]'",
        ),
        (
            lambda m: m.setitem(sys.modules, "pycuda.driver", None),
            rf"pycuda can't be loaded: .*: check the GPU and its driver and {INSTALL}",
        ),
        (
            lambda m: m.setattr(sys.modules["pycuda.driver"], "init", broken_init),
            "no usable GPU: cuInit failed: no device: check the GPU",
        ),
        (lambda m: m.setattr(fake_cuda.Device, "count_here", 0), "no NVIDIA GPU: check the GPU"),
    ],
)
def test_what_is_missing_is_said_with_its_cure(
    change: Callable[[pytest.MonkeyPatch], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(monkeypatch)
    with pytest.raises(BackendError, match=f"^backend 'tensorrt': {message}") as caught:
        open_session("tensorrt", small_graph())
    assert "\n" not in str(caught.value)


def test_objects_that_tensorrt_does_not_give_are_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def null(self: Any, logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake_tensorrt.Builder, "__init__", null)
    with pytest.raises(BackendError, match="TensorRT can't start: no reason given"):
        build(small_graph())
