"""TensorRT's answers and what is asked of it for them, on a stand-in that computes them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import GPU, Driver
from trt_cases import build, small_graph

from cdt_runtime.backends import BACKENDS, trt
from cdt_runtime.backends.trt_build import build_plans
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.doctor_cli import doctor_command
from cdt_runtime.errors import BackendError
from cdt_runtime.golden import FULL, self_test
from cdt_runtime.proof import choose_backend, examine

pytestmark = pytest.mark.usefixtures("driver")

HERE = "NVIDIA Fake (compute 9.0) with TensorRT 11.4.0.106, CUDA driver 13000"


def inputs(batch: int, classes: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    return {
        "tile": rng.integers(0, 256, (batch, 3, 4, 4), dtype=np.uint8),
        "prototypes": rng.random((classes, 3), dtype=np.float32),
    }


def expected(given: dict[str, Any]) -> Any:
    return 2 * given["tile"].mean(axis=(2, 3), dtype=np.float32) @ given["prototypes"].T


@pytest.fixture
def session(driver: Driver) -> trt.TensorRtSession:
    build(small_graph())
    GPU.log.clear()
    return trt.TensorRtSession(small_graph())


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
    assert GPU.log == [
        *("context", "use profile 0", *work, "wait"),
        *("begin", *(f"record {line}" for line in work), "end"),
        *(held, "replay", "wait"),
    ]
    GPU.log.clear()
    again = session.run({**given, "tile": 255 - given["tile"]})
    assert GPU.log == ["replay", "wait"]
    assert np.allclose(again["logits"], expected({**given, "tile": 255 - given["tile"]}))
    assert np.allclose(found["logits"], expected(given))  # not the buffer of the next call
    given["prototypes"] *= -1  # in place: the same array
    assert np.allclose(session.run(given)["logits"], expected(given))
    assert GPU.log[2:] == [held, "replay", "wait"]


def test_each_shape_is_recorded_once_and_a_batch_is_filled_up(session: trt.TensorRtSession) -> None:
    for batch, classes in ((1, 2), (3, 2), (4, 2), (3, 5), (1, 2)):
        given = inputs(batch, classes)
        found = session.run(given)
        assert found["logits"].shape == (batch, classes)
        assert np.allclose(found["logits"], expected(given))
    log = GPU.log
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
    assert GPU.log.count("replay") == 3
    assert [*session._fixed] == [(32, 2), (8, 2)]


def test_memory_of_rare_shapes_is_given_back(
    session: trt.TensorRtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_runtime.backends.shapes.KEPT", 1)
    session.run(inputs(1))
    session.run(inputs(2))
    assert GPU.log.count("forget") == 1
    assert len(GPU.graphs) == 1


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
    session: trt.TensorRtSession, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.run(inputs(1))
    driver.code = 700
    with pytest.raises(BackendError, match=r"CUDA driver refuses cuGraphLaunch: error 700$"):
        session.run(inputs(1))
    driver.code = 0
    runs = iter([True, False])
    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", lambda *_: next(runs))
    GPU.log.clear()
    with pytest.raises(BackendError, match="TensorRT can't run the plan: no reason given"):
        session.run(inputs(2))
    assert GPU.log[-1] == "end"


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
    assert f"\ntensorrt     no: backend 'tensorrt': no plan for this graph on {HERE}" in out
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
    assert "init" not in GPU.log  # nothing was built: the GPU is not even asked
    plans = [path for _, path in build_plans(bundle)]
    assert tried() == ["tensorrt", "cuda", "onnxruntime"]
    (proof,) = (p for p in tmp_path.glob("*.proof") if "tensorrt" in p.read_text())
    facts = json.loads(proof.read_text())
    assert (facts["refused"], facts["gap"] < FULL) == ("", True)
    plans[0].unlink()
    assert tried() == ["cuda", "onnxruntime"]
