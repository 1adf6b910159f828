"""The engines, each alone, and the choice among them."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdt_runtime import golden, proof
from cdt_runtime.backends import BACKENDS, Precision, open_session, ort, ort_cuda, ov, shapes
from cdt_runtime.backends.session import OutOfMemory, failure, run_batch
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.doctor import ONE_NODE
from cdt_runtime.errors import BackendError, ParityError
from cdt_runtime.golden import FULL, HALF, golden_inputs, self_test
from cdt_runtime.proof import Choice, choose_backend, examine

CPU_ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return Bundle.open(bundle_dir)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "DRIVERS", ())


@pytest.mark.parametrize("backend", CPU_ENGINES)
def test_each_engine_answers_as_pytorch_did(bundle: Bundle, backend: str) -> None:
    gaps = self_test(bundle, backend, "fp32")
    assert set(gaps) >= {"out_ct_tokens", "out_embedding_with_ct", "out_logits_without_ct"}
    assert max(gaps.values()) < FULL


def test_fp32_is_never_rounded_and_the_engine_says_what_it_does(bundle: Bundle) -> None:
    graph = bundle.read("path_encoder.onnx")
    exact, fast = open_session("openvino", graph, "fp32"), open_session("openvino", graph)
    assert (exact.half, exact.engine.split()[0], exact.engine.split()[2:]) == (
        False,
        "openvino",
        ["CPU", "f32"],
    )
    assert fast.half == (fast.engine.split()[-1] != "f32")
    reference = open_session("onnxruntime", graph)
    tile = {"tile": golden_inputs(bundle.preprocess)["in_tile"]}
    expected = reference.run(tile)["tile_tokens"]
    scale = np.abs(expected).max()
    assert np.abs(exact.run(tile)["tile_tokens"] - expected).max() < FULL * scale
    assert np.abs(fast.run(tile)["tile_tokens"] - expected).max() < HALF * scale


@pytest.mark.parametrize("backend", CPU_ENGINES)
def test_an_answer_is_not_changed_by_the_next_one(bundle: Bundle, backend: str) -> None:
    session = open_session(backend, bundle.read("path_encoder.onnx"))
    tiles = golden_inputs(bundle.preprocess)["in_tile"]
    first = session.run({"tile": tiles[:1]})["tile_tokens"]
    kept = first.copy()
    second = session.run({"tile": tiles[1:2]})["tile_tokens"]
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)


def random_inputs(batch: int, bundle: Bundle) -> dict[str, Any]:
    graph = bundle.manifest["graphs"]["tile_classifier"]["inputs"]
    rng, found = np.random.default_rng(batch), {}
    for name, entry in graph.items():
        free = {"batch": batch, "classes": 2}
        shape = [free.get(size, size) for size in entry["shape"]]
        values = rng.random(shape) * (255 if entry["dtype"] == "uint8" else 1)
        found[name] = values.astype(entry["dtype"])
    return found


@pytest.fixture
def bound(bundle: Bundle) -> ort_cuda.CudaSession:
    """What the GPU runs, with its arrays on the CPU."""
    return ort_cuda.CudaSession(bundle.read("tile_classifier.onnx"), "fp32", ort.CPU)


def test_cuda_of_installed_wheels_is_loaded_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    loaded = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append(print("libcublas")))
    ort._load_cuda.cache_clear()
    for _ in range(2):
        with pytest.raises(BackendError, match="CUDAExecutionProvider"):
            ort.load(ONE_NODE, ort_cuda.PROVIDER)
    ort._load_cuda.cache_clear()
    assert len(loaded) == 1
    assert capsys.readouterr().out == ""


def test_operators_that_only_a_cpu_has_are_no_fault_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    said = "[ONNXRuntimeError] : 1 : FAIL : all compute graph nodes have not been partitioned to it"
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: raised(said))
    with pytest.raises(BackendError, match=r"only a CPU computes.*: export with --fp16, or use"):
        ort.load(ONE_NODE, ort_cuda.PROVIDER)


def raised(text: str) -> None:
    raise RuntimeError(text)


def test_batches_are_filled_up_and_cut_back(bundle: Bundle, bound: ort_cuda.CudaSession) -> None:
    plain = open_session("onnxruntime", bundle.read("tile_classifier.onnx"))
    for batch in (1, 3, 4, 3, 2):
        inputs = random_inputs(batch, bundle)
        found, expected = bound.run(inputs), plain.run(inputs)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert found[name].shape == values.shape
            assert np.allclose(found[name], values, atol=1e-4)
    assert [*bound._fixed] == [(1, 2), (4, 2), (2, 2)]


def test_what_stays_on_the_device_is_renewed_when_it_changes(
    bundle: Bundle, bound: ort_cuda.CudaSession
) -> None:
    inputs = random_inputs(2, bundle)
    first = bound.run(inputs)
    inputs["prototypes"] *= -1  # in place: the same array
    second = bound.run(inputs)
    assert np.array_equal(first["embedding"], second["embedding"])
    assert np.abs(first["distances"] - second["distances"]).max() > 0.1


def test_sessions_of_rare_sizes_make_room(
    bundle: Bundle, bound: ort_cuda.CudaSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "KEPT", 2)
    for batch in (1, 2, 1, 4):
        bound.run(random_inputs(batch, bundle))
    assert [*bound._fixed] == [(1, 2), (4, 2)]


def test_arrays_that_do_not_fit_are_refused(bundle: Bundle, bound: ort_cuda.CudaSession) -> None:
    inputs = random_inputs(2, bundle)
    for name, wrong in (
        ("tile", inputs["tile"][:, :2]),
        ("tile", inputs["tile"][0]),
        ("tile", inputs["tile"][:0]),
        ("prototypes", inputs["prototypes"][:, 1:]),
        ("prototypes", inputs["prototypes"].astype(np.float64)),
        ("prototypes", inputs["prototypes"].view(np.int32)),
    ):
        with pytest.raises(BackendError, match=rf"input {name}: expected .* \[.*\], found .* \["):
            bound.run({**inputs, name: wrong})
    del inputs["scale"]
    with pytest.raises(BackendError, match="input scale is missing"):
        bound.run(inputs)


def test_what_the_device_refuses_is_said_in_one_line(
    bundle: Bundle, bound: ort_cuda.CudaSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail  # no RuntimeError

    def full(*_: Any) -> None:
        raise Fail("out of memory\nat line 1")

    bound.run(random_inputs(2, bundle))
    monkeypatch.setattr(ort_cuda._Fixed, "run", full)
    with pytest.raises(BackendError, match=r"CPUExecutionProvider: out of memory$"):
        bound.run(random_inputs(2, bundle))
    monkeypatch.setattr(ort_cuda, "_on_device", full)
    with pytest.raises(BackendError, match="out of memory: check the GPU and its driver"):
        bound.run(random_inputs(8, bundle))


def test_an_unknown_backend_is_said(bundle_dir: Path) -> None:
    expected = "backend 'tpu': expected one of auto, tensorrt, cuda, openvino, onnxruntime"
    with pytest.raises(BackendError, match=expected):
        FewShotClassifier.open(bundle_dir, backend="tpu")


def test_a_missing_gpu_is_an_error_never_the_cpu(
    bundle_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackendError, match="CUDA"):
        FewShotClassifier.open(bundle_dir, backend="cuda")
    assert capfd.readouterr().out == ""


def test_a_missing_openvino_is_an_error_with_its_cure(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "openvino":
            raise ImportError(name)
        return whole(name, *rest)

    ov._core.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"not installed: pip install 'cdt-edge\[openvino\]'"):
        FewShotClassifier.open(bundle_dir, backend="openvino")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("onnxruntime", "CPUExecutionProvider: can't load the graph: "),
        ("openvino", "openvino: can't load the graph: "),
    ],
)
def test_a_graph_that_is_none_is_one_error(backend: str, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        open_session(backend, b"\x12\x05empty")  # a model without a graph
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", CPU_ENGINES)
def test_inputs_that_do_not_fit_the_graph_are_one_error(bundle: Bundle, backend: str) -> None:
    session = open_session(backend, bundle.read("ct_encoder.onnx"))
    with pytest.raises(BackendError, match=rf"{backend} .*: .") as caught:
        session.run({"ct": np.zeros((1, 1, 8, 64, 63), np.float32)})
    assert "\n" not in str(caught.value)


class Paces:
    """Stands for self-test and clock: which engines fail, and what a tile takes on the others."""

    def __init__(self, times: dict[str, float], fails: Sequence[str] = ()) -> None:
        self.times, self.fails, self.tests = times, fails, list[str]()

    def self_test(self, bundle: Bundle, name: str, precision: Precision) -> dict[str, float]:
        self.tests.append(f"{name} {precision}")
        if self.tests[-1] in self.fails:
            raise ParityError(f"{self.tests[-1]} is off")
        return {"out_logits": 1e-4, "out_embedding": 2e-4}

    def tile_ms(self, bundle: Bundle, name: str, precision: Precision) -> float:
        return self.times[name]


@pytest.fixture
def paces(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> Callable[[dict[str, float], Sequence[str]], Paces]:
    def install(times: dict[str, float], fails: Sequence[str] = ()) -> Paces:
        found = Paces(times, fails)
        monkeypatch.setattr(proof, "self_test", found.self_test)
        monkeypatch.setattr(proof, "tile_ms", found.tile_ms)
        return found

    return install


@pytest.mark.usefixtures("no_gpu")
def test_each_engine_is_tested_and_timed_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_backend(bundle, "fp32", tmp_path)
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*.proof")]
    assert {facts["backend"] for facts in kept} == {*CPU_ENGINES}
    assert {facts["bundle"] for facts in kept} == {bundle.identity}
    assert all(0 < facts["gap"] < FULL for facts in kept)
    fastest = min(kept, key=lambda facts: facts["tile_ms"])
    assert chosen == Choice(fastest["backend"], "fp32")
    monkeypatch.setattr(proof, "self_test", None)
    monkeypatch.setattr(proof, "tile_ms", None)
    assert choose_backend(bundle, "fp32", tmp_path) == chosen


def test_what_changes_an_outcome_is_tested_anew(
    bundle: Bundle, tmp_path: Path, paces: Callable[..., Paces], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = paces({"openvino": 2.0, "onnxruntime": 1.0})
    both = ["openvino fp32", "onnxruntime fp32"]
    choose_backend(bundle, "fp32", tmp_path)
    choose_backend(bundle, "fp32", tmp_path)
    assert found.tests == both
    for path in tmp_path.glob("*.proof"):  # as of a version that did not time
        path.write_text('{"refused": ""}')
    choose_backend(bundle, "fp32", tmp_path)
    assert found.tests == both * 2
    monkeypatch.setattr(proof, "_version", lambda package: "another")
    choose_backend(bundle, "fp32", tmp_path)
    choose_backend(bundle, "fp32", None)
    examine(bundle, "fp32", tmp_path, anew=True)
    assert found.tests == both * 5


@pytest.mark.parametrize(
    ("times", "fails", "chosen", "notes"),
    [
        ((2.0, 3.0), (), ("openvino", "auto"), ()),
        ((3.0, 2.0), (), ("onnxruntime", "auto"), ()),
        ((2.0, 3.0), ("openvino auto",), ("openvino", "fp32"), ()),
        (
            (2.0, 3.0),
            ("openvino auto", "openvino fp32"),
            ("onnxruntime", "auto"),
            ("openvino is not used: openvino fp32 is off",),
        ),
    ],
)
def test_the_fastest_that_passes_is_taken_and_what_fails_is_said(
    bundle_dir: Path,
    tmp_path: Path,
    paces: Callable[..., Paces],
    times: tuple[float, float],
    fails: tuple[str, ...],
    chosen: tuple[str, str],
    notes: tuple[str, ...],
) -> None:
    tests = paces(dict(zip(("openvino", "onnxruntime"), times, strict=True)), fails).tests
    passing = 1 if len(fails) == 2 else 2
    for _ in range(2):  # tested, then remembered
        found = FewShotClassifier.open(bundle_dir, cache=tmp_path)
        assert (found.backend, found.precision, found.notes) == (*chosen, notes)
        assert found.engine.startswith(f"{chosen[0]} ")
        assert len(tests) == passing + len(fails)


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_that_can_not_run_is_tried_again_the_next_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, paces: Callable[..., Paces]
) -> None:
    def broken(of: Bundle, name: str, precision: Any) -> dict[str, float]:
        raise BackendError("its driver is missing")

    monkeypatch.setattr(proof, "self_test", broken)
    with pytest.raises(BackendError, match="no engine can be used: openvino is not used: its dri"):
        choose_backend(bundle, "auto", tmp_path)
    paces({"openvino": 1.0, "onnxruntime": 2.0})
    assert choose_backend(bundle, "auto", tmp_path) == Choice("openvino", "auto")


def test_a_tile_is_timed_on_inputs_that_the_graph_takes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 9.0] * golden.WARMUP + [0.0, 0.002] * golden.ROUNDS)
    monkeypatch.setattr(golden, "perf_counter", lambda: next(clock))
    assert golden.tile_ms(bundle, "onnxruntime") == pytest.approx(2.0)
    inputs = golden.one_tile(bundle)
    assert {name: len(values) for name, values in inputs.items()} == {
        "tile": 1,
        "ct_tokens": 1,
        "ct_present": 1,
        "prototypes": 2,
        "scale": 1,
    }


def test_a_folder_that_can_not_be_written_only_costs_time(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert choose_backend(bundle, "auto", tmp_path / "file" / "x").backend in BACKENDS


class SmallMemory:
    """An engine that has room for a few tiles."""

    engine, half = "small", False

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, []

    def run(self, inputs: Any) -> dict[str, Any]:
        size = len(inputs["tile"])
        self.sizes.append(size)
        if size > self.room:
            raise failure("small", RuntimeError("Failed to allocate memory for requested buffer"))
        return {"logits": inputs["tile"] * inputs["scale"]}


@pytest.mark.parametrize(("count", "sizes"), [(4, [4]), (8, [8, 4, 4]), (7, [7, 4, 3])])
def test_a_batch_is_halved_once_where_memory_is_short(count: int, sizes: list[int]) -> None:
    session = SmallMemory(4)
    tiles = np.arange(count, dtype=np.float32)
    found, size = run_batch(session, {"tile": tiles}, {"scale": np.float32(2)})
    assert np.array_equal(found["logits"], 2 * tiles)
    assert session.sizes == sizes
    assert size == (None if count <= 4 else 4)


def test_no_memory_for_half_of_it_is_an_error(bundle_dir: Path) -> None:
    said = (
        r"^small: Failed to allocate memory for requested buffer; nor for 8 at a time: free its "
        r"memory, or use another --backend$"
    )
    with pytest.raises(BackendError, match=said):
        run_batch(SmallMemory(4), {"tile": np.zeros(16)}, {"scale": np.float32(2)})
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime")
    classifier._run(SmallMemory(16), {"tile": np.zeros(32)}, {"scale": np.float32(2)})
    assert classifier.batch_size == 16


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("CUDA error: out of memory\nat 1"), True),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("Invalid shape"), False),
    ],
)
def test_what_an_engine_says_without_memory_is_known(error: Exception, full: bool) -> None:
    found = failure("engine", error, ": cure")
    assert isinstance(found, OutOfMemory) is full
    assert "\n" not in str(found)
