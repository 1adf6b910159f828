"""The README shows what the benchmarks' results say, and the benchmarks part data honestly."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/accuracy.py`, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("accuracy")


def test_the_readme_shows_the_results_at_hand(bench: ModuleType) -> None:
    assert bench.accuracy_block() in (ROOT / "README.md").read_text("utf-8")


def test_every_part_has_a_table_and_a_title(bench: ModuleType) -> None:
    tables = sys.modules["accuracy_tables"]
    assert set(bench.PARTS) == set(tables.TABLES) == set(tables.TITLES)


def test_groups_are_dealt_out_evenly_and_stay_whole(bench: ModuleType) -> None:
    groups = {f"{label}_{index}": label for label in "abc" for index in range(30)}
    folds = sys.modules["accuracy_parts"]._folds(groups)
    counts = Counter((groups[group], fold) for group, fold in folds.items())
    assert set(counts.values()) == {10}
    assert len(counts) == 9
    assert folds == sys.modules["accuracy_parts"]._folds(dict(reversed(groups.items())))


def test_a_block_goes_between_its_marks(bench: ModuleType) -> None:
    put = sys.modules["records"].with_block
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert put(text, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="lacks the marks <!-- y --> and <!-- /y -->"):
        put(text, "y", "new\n")


def test_a_result_says_what_it_was_found_by(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = sys.modules["records"]
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    records.write_result("lung", ["cdt-train --config X"], 61.4, {"accuracy": 0.9})
    found = records.read_results()["lung"]
    assert found["commands"] == ["cdt-train --config X"]
    assert (found["seconds"], found["figures"]) == (61, {"accuracy": 0.9})
    assert set(found["machine"]) == {"processor", "cores", "gpus", "python", "packages"}


def test_rounds_take_turns_and_ratios_go_by_pair(bench: ModuleType) -> None:
    timing = importlib.import_module("timing")
    calls: list[tuple[str, int]] = []
    peers = {name: lambda n, name=name: calls.append((name, n)) for name in "ab"}
    times = timing.interleaved(peers, 3, warmup=1)
    assert calls[2:] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert len(times["a"].wall) == 3
    fast, slow = timing.Times([1.0, 2.0, 9.0]), timing.Times([2.0, 4.0, 9.0])
    assert timing.ratio(slow, fast) == 2.0


def test_percentiles_wait_for_enough_queries(bench: ModuleType) -> None:
    timing = importlib.import_module("timing")
    few = timing.Times([*map(float, range(63))]).facts()
    many = timing.Times([*map(float, range(1000))]).facts()
    assert "p90" not in few
    assert (many["p50"], many["p90"], many["p99"]) == (499.5, 900.0, 990.0)


def test_an_engine_with_another_answer_is_not_timed(
    bench: ModuleType, trained_dir: Path, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    peers = importlib.import_module("latency_peers")
    graph = peers.graphs_of(trained_dir / "best_model.pt")["ct_encoder"]
    onnx = (bundle_dir / "ct_encoder.onnx").read_bytes()
    inputs = {"ct": graph.inputs["ct"].numpy()}

    def half(graph: bytes, provider: str) -> object:
        run = peers.open_session("onnxruntime", graph).run
        return lambda arrays: {name: np.float32(0.5) * v for name, v in run(arrays).items()}

    monkeypatch.setattr(peers, "_defaults", half)
    found = peers.peers_of(graph, onnx, inputs, full=False)
    assert found["ONNX Runtime, defaults"].startswith("another answer: off by 0.5")
    assert found["onnxruntime auto"].gap < 1e-3
    assert peers.flops(graph, inputs) > 1e6


@pytest.fixture
def gpu(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu")


def test_without_a_gpu_its_benchmark_says_so_in_one_line(
    gpu: ModuleType, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_runtime.backends.ort.DRIVERS", ())
    message = "no NVIDIA GPU here (no driver): run this where nvidia-smi lists one"
    assert shell(gpu.main) == (2, "", f"error: {message}\n")


@pytest.fixture
def on_a_gpu(
    gpu: ModuleType,
    bundle_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache_dir: Path,
) -> ModuleType:
    """The script where the GPU is played by the CPU and the latency table by nothing."""
    parts, report = (importlib.import_module(f"latency_{name}") for name in ("parts", "report"))
    subject = parts.Subject(tmp_path, bundle_dir, tmp_path, (), quick=False)
    monkeypatch.setattr("cdt_runtime.backends.ort.DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(importlib.import_module("latency"), "prepare", lambda *_: subject)
    monkeypatch.setattr(parts, "engines", lambda _: {"table": 1})
    monkeypatch.setattr(report, "engines_text", lambda _: "the table")
    monkeypatch.setattr(sys.modules["records"], "RESULTS", tmp_path / "results")
    monkeypatch.setitem(gpu.PATHS, "cuda", lambda graph: gpu.open_session("onnxruntime", graph))
    return gpu


def test_each_cuda_path_is_tested_compared_and_written_down(
    on_a_gpu: ModuleType, shell: Shell, tmp_path: Path
) -> None:
    code, out, err = shell(on_a_gpu.main, "--work", tmp_path / "work")
    assert code == 0
    assert "\ncuda: self-test " in out
    assert "\ntensorrt: backend 'tensorrt': " in out
    assert "\nthe table\n" in out
    assert err == f"written: {tmp_path / 'results' / 'gpu.json'}\n"
    figures = sys.modules["records"].read_results()["gpu"]["figures"]
    assert set(figures) == {"device", "plans", *on_a_gpu.PATHS, "latency", "host"}
    cuda = figures["cuda"]
    assert set(cuda["parity"]) >= {"tile_classifier 1", "tile_classifier 40", "ct_encoder 1"}
    assert max(cuda["self_test"].values()) < 1e-3
    assert "not_run" in figures["TensorRT through ONNX Runtime"]
    assert "tensorrt" in figures["plans"]["not_run"]
    assert "tensorrt" in figures["host"]["not_run"]


def test_a_cuda_path_with_another_answer_is_an_error(
    on_a_gpu: ModuleType, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(on_a_gpu, "relative_gap", lambda *_: 0.5)
    code, out, _ = shell(on_a_gpu.main, "--work", tmp_path / "work", "--quick")
    assert code == 1
    assert "\nthe table\n" in out
    assert "\ncuda: onnxruntime " in out
    assert " at batch 1 is off by 0.5 of its range, allowed 0.001\n" in out
    assert not (tmp_path / "results").exists()


def test_what_fails_on_the_gpu_does_not_cost_the_rest(
    on_a_gpu: ModuleType, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(bundle: object) -> None:
        raise OSError("its library is odd\nat line 1")

    monkeypatch.setattr(on_a_gpu, "plans", broken)
    code, out, err = shell(on_a_gpu.main, "--work", tmp_path / "work", "--quick")
    assert code == 1
    assert "\nplans: OSError: its library is odd at line 1\n" in out
    assert "Traceback" in err
    assert "\ncuda: self-test " in out


def test_the_readme_shows_how_doubt_holds(bench: ModuleType) -> None:
    doubt = importlib.import_module("doubt")
    found = sys.modules["records"].read_results()["doubt"]["figures"]
    assert doubt.block(found) in (ROOT / "README.md").read_text("utf-8")


def test_foreign_tiles_are_tiles(bench: ModuleType, real_data: Path) -> None:
    made = importlib.import_module("doubt_tiles").foreign(
        [np.full((64, 64, 3), 9, np.uint8)] * 3, real_data
    )
    for name, tiles in made.items():
        assert len(tiles) >= 3, name
        assert {(tile.dtype, tile.ndim, tile.shape[2]) for tile in tiles} == {
            (np.dtype(np.uint8), 3, 3)
        }, name
