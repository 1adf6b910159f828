"""TensorRT: what is asked of it and in which order, on a stand-in that computes the answers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt as fake
import numpy as np
import pytest

from cdt_runtime.backends import BACKENDS, device, open_session, ort, trt, trt_library, trt_plan
from cdt_runtime.backends.trt_build import build_plans
from cdt_runtime.bundle import Bundle, sha256
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.doctor_cli import doctor_command
from cdt_runtime.errors import BackendError
from cdt_runtime.golden import FULL, self_test
from cdt_runtime.proof import choose_backend, examine

INSTALL = r"pip install 'cdt-edge\[tensorrt\]', or use another --backend$"
GPU = "NVIDIA Fake (compute 9.0) with TensorRT 11.4.0.106, CUDA driver 13000"


def small_graph(constant: float = 2.0, tile: str = "batch") -> bytes:
    """Scores of uint8 tiles `(B, 3, 4, 4)` against prototypes `(K, 3)`."""
    from onnx import TensorProto, helper

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("Cast", ["tile"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0),
        helper.make_node("Transpose", ["prototypes"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["embedding", "columns"], ["products"]),
        helper.make_node("Mul", ["products", "constant"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            value("tile", TensorProto.UINT8, tile, 3, 4, 4),
            value("prototypes", TensorProto.FLOAT, "classes", 3),
        ],
        [
            value("embedding", TensorProto.FLOAT, tile, 3),
            value("logits", TensorProto.FLOAT, tile, "classes"),
        ],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("constant", TensorProto.FLOAT, [1], [constant]),
        ],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


def fixed_graph() -> bytes:
    """One without a free dimension, as the CT encoder is."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["ct"], ["ct_tokens"])],
        "fixed",
        [info("ct", TensorProto.FLOAT, [1, 4])],
        [info("ct_tokens", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


class FewGraphs:
    """Stands for a bundle: graphs by name."""

    def __init__(self, graphs: dict[str, bytes], precision: str = "fp16") -> None:
        self.path, self._graphs = Path("engines/some"), graphs
        self.manifest = {"graphs": {name: {} for name in graphs}, "precision": precision}

    def read(self, name: str) -> bytes:
        return self._graphs[name.removesuffix(".onnx")]


def build(*graphs: bytes, precision: str = "fp16") -> list[Path]:
    bundle: Any = FewGraphs({f"graph{n}": graph for n, graph in enumerate(graphs)}, precision)
    return [path for _, path in build_plans(bundle)]


def inputs(batch: int, classes: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    return {
        "tile": rng.integers(0, 256, (batch, 3, 4, 4), dtype=np.uint8),
        "prototypes": rng.random((classes, 3), dtype=np.float32),
    }


def expected(given: dict[str, Any]) -> Any:
    return 2 * given["tile"].mean(axis=(2, 3), dtype=np.float32) @ given["prototypes"].T


def forget() -> None:
    for one in (device.first_device, trt_library.logger):
        one.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path) -> fake.Driver:
    """A machine with a GPU, TensorRT and pycuda, as far as names go."""
    fake.GPU.__init__()  # type: ignore[misc]
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ort, "DRIVERS", (str(tmp_path),))
    stands = fake.Driver()
    monkeypatch.setattr(device, "_driver", lambda: stands)
    forget()
    return stands


@pytest.fixture(autouse=True)
def _nothing_stays(driver: fake.Driver) -> Any:
    yield
    forget()
    assert fake.GPU.depth == 0


@pytest.fixture
def session(driver: fake.Driver) -> trt.TensorRtSession:
    build(small_graph())
    fake.GPU.log.clear()
    return trt.TensorRtSession(small_graph())


def test_a_plan_is_built_with_profiles_for_one_tile_and_for_batches() -> None:
    build(small_graph())
    one = {"tile": [[1, 3, 4, 4]] * 3, "prototypes": [[1, 3], [8, 3], [1024, 3]]}
    many = {**one, "tile": [[1, 3, 4, 4], [32, 3, 4, 4], [32, 3, 4, 4]]}
    assert fake.GPU.log == [
        "init",
        "clear TF32",
        f"profile {json.dumps(one)}",
        f"profile {json.dumps(many)}",
        "timings b''",
        "build",
    ]


def test_a_graph_without_free_sizes_has_no_profile_and_needs_none() -> None:
    build(fixed_graph())
    assert not any("profile" in line for line in fake.GPU.log)
    session = trt.TensorRtSession(fixed_graph())
    given = {"ct": np.array([[1, 2, 3, 4]], np.float32)}
    for sign in (1, -1):
        found = session.run({"ct": sign * given["ct"]})
        assert np.array_equal(found["ct_tokens"], -sign * given["ct"])
    assert not any("profile" in line for line in fake.GPU.log)


def test_times_of_kernels_are_kept_and_used_again(cache_dir: Path) -> None:
    build(small_graph(), fixed_graph())
    (path,) = (cache_dir / "plans").glob("*.timings")
    assert path.read_bytes() == b"++"
    assert [line for line in fake.GPU.log if "timings" in line] == ["timings b''", "timings b'+'"]
    path.write_bytes(b"other GPU")
    fake.GPU.log.clear()
    build(small_graph())
    assert [line for line in fake.GPU.log if "timings" in line] == [
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
        lambda m: m.setattr(fake.Device, "name", lambda self: "NVIDIA Other"),
    ):
        with monkeypatch.context() as changed:
            change(changed)
            forget()
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


def test_a_call_sends_what_changed_and_replays_the_rest(session: trt.TensorRtSession) -> None:
    assert (session.engine, session.half) == (
        "tensorrt 11.4.0.106 NVIDIA Fake (compute 9.0)",
        False,
    )
    given = inputs(1)
    found = session.run(given)
    assert np.allclose(found["logits"], expected(given))
    work = [
        "send uint8 [1, 3, 4, 4]",
        "execute",
        "fetch float32 [1, 3]",
        "fetch float32 [1, 2]",
    ]
    held = "send float32 [2, 3]"
    assert fake.GPU.log == [
        *("context", "use profile 0", *work, "wait"),
        *("begin", *(f"record {line}" for line in work), "end"),
        *(held, "replay", "wait"),
    ]
    fake.GPU.log.clear()
    again = session.run({**given, "tile": 255 - given["tile"]})
    assert fake.GPU.log == ["replay", "wait"]
    assert np.allclose(again["logits"], expected({**given, "tile": 255 - given["tile"]}))
    assert np.allclose(found["logits"], expected(given))  # not the buffer of the next call
    given["prototypes"] *= -1  # in place: the same array
    assert np.allclose(session.run(given)["logits"], expected(given))
    assert fake.GPU.log[2:] == [held, "replay", "wait"]


def test_each_shape_is_recorded_once_and_a_batch_is_filled_up(session: trt.TensorRtSession) -> None:
    for batch, classes in ((1, 2), (3, 2), (4, 2), (3, 5), (1, 2)):
        given = inputs(batch, classes)
        found = session.run(given)
        assert found["logits"].shape == (batch, classes)
        assert np.allclose(found["logits"], expected(given))
    log = fake.GPU.log
    assert log.count("begin") == log.count("context") == 3
    assert [line for line in log if "profile" in line] == [
        "use profile 0",
        "use profile 1",
        "use profile 1",
    ]
    assert log.count("replay") == 5


def test_more_tiles_than_a_plan_takes_go_through_in_pieces(session: trt.TensorRtSession) -> None:
    given = inputs(70)
    found = session.run(given)
    assert np.allclose(found["logits"], expected(given))
    assert found["embedding"].shape == (70, 3)
    assert fake.GPU.log.count("replay") == 3
    assert [*session._fixed] == [(32, 2), (8, 2)]


def test_memory_of_rare_shapes_is_given_back(
    session: trt.TensorRtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_runtime.backends.shapes.KEPT", 1)
    session.run(inputs(1))
    session.run(inputs(2))
    assert fake.GPU.log.count("forget") == 1
    assert len(fake.GPU.graphs) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"tile": np.zeros((1, 3, 4, 4), np.float32)},
            "input tile: expected uint8 .*, found float",
        ),
        (
            {"prototypes": np.zeros((2, 4), np.float32)},
            r"input prototypes: .*found float32 \[2, 4\]",
        ),
        (
            {"prototypes": np.zeros((1025, 3), np.float32)},
            r"can't take prototypes \[1025, 3\]: no re",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    session: trt.TensorRtSession, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=rf"^tensorrt 11.4.0.106 NVIDIA .*: .*{message}"):
        session.run({**inputs(1), **wrong})


def test_what_the_driver_refuses_is_said_and_the_recording_ended(
    session: trt.TensorRtSession, driver: fake.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.run(inputs(1))
    driver.code = 700
    with pytest.raises(BackendError, match=r"CUDA driver refuses cuGraphLaunch: error 700$"):
        session.run(inputs(1))
    driver.code = 0
    runs = iter([True, False])
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: next(runs))
    fake.GPU.log.clear()
    with pytest.raises(BackendError, match="TensorRT can't run the plan: no reason given"):
        session.run(inputs(2))
    assert fake.GPU.log[-1] == "end"


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
        (b"none", r"TensorRT can't read the graph: In node 3 with operator Odd: no importer$"),
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
    monkeypatch.setattr(fake.Builder, "_refuses", True)
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
    raise fake.Error("cuInit failed: no device\nat line 1")


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
        (lambda m: m.setattr(fake.Device, "count_here", 0), "no NVIDIA GPU: check the GPU"),
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

    monkeypatch.setattr(fake.Builder, "__init__", null)
    with pytest.raises(BackendError, match="TensorRT can't start: no reason given"):
        build(small_graph())


def test_a_bundle_decides_on_plans_as_pytorch_did(bundle_dir: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    with pytest.raises(BackendError, match=r"no plan for this graph .*cdt-doctor --build BUNDLE"):
        FewShotClassifier.open(bundle_dir, backend="tensorrt")
    names = [name for name, _ in build_plans(bundle)]
    assert names == [*bundle.manifest["graphs"]]
    assert max(self_test(bundle, "tensorrt").values()) < FULL
    assert FewShotClassifier.open(bundle_dir, backend="tensorrt").engine.startswith("tensorrt 11")


def test_the_doctor_builds_the_plans_and_tests_them(
    shell: Callable[..., tuple[int, str, str]], bundle_dir: Path, cache_dir: Path
) -> None:
    _, out, _ = shell(doctor_command, bundle_dir)
    assert f"\ntensorrt     no: backend 'tensorrt': no plan for this graph on {GPU}" in out
    assert "build it with cdt-doctor --build BUNDLE\n" in out
    code, out, err = shell(doctor_command, "--build", bundle_dir)
    assert (code, err) == (0, f"built: 5 plans in {cache_dir / 'plans'}\n")
    assert "\ntensorrt     passes the self-test: off by at most " in out
    again, _, _ = shell(doctor_command, bundle_dir)
    assert again == 0


def test_the_gpu_benchmark_builds_compares_and_times_plans(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu, bundle = importlib.import_module("gpu"), Bundle.open(bundle_dir)
    assert set(gpu.plans(bundle)["bytes"]) == set(bundle.manifest["graphs"])
    found = gpu.examined("tensorrt", bundle)
    assert max(found["self_test"].values()) < FULL
    assert found["engine"] == "tensorrt 11.4.0.106 NVIDIA Fake (compute 9.0)"
    assert max(found["parity"].values()) < FULL
    times = gpu.host_latency(bundle, 5)
    assert (times["run"]["n"], times["replay"]["n"]) == (5, 5)


def test_auto_takes_it_up_only_when_all_plans_are_there(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundle_dir)
    monkeypatch.setattr("cdt_runtime.backends.ov.find_spec", lambda name: None)

    def tried() -> list[str]:
        return [one.backend for one in examine(bundle, "auto", tmp_path)]

    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["onnxruntime"])
    assert tried() == ["cuda", "onnxruntime"]
    assert choose_backend(bundle, "auto", tmp_path).notes == ()
    assert "init" not in fake.GPU.log  # nothing was built: the GPU is not even asked
    plans = [path for _, path in build_plans(bundle)]
    assert tried() == ["tensorrt", "cuda", "onnxruntime"]
    (proof,) = (p for p in tmp_path.glob("*.proof") if "tensorrt" in p.read_text())
    facts = json.loads(proof.read_text())
    assert (facts["refused"], facts["gap"] < FULL) == ("", True)
    plans[0].unlink()
    assert tried() == ["cuda", "onnxruntime"]
