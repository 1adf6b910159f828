"""`cdt-doctor`: what it says of a machine, its engines and a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdt_runtime import doctor
from cdt_runtime.backends import BACKENDS, ort
from cdt_runtime.bundle import Bundle
from cdt_runtime.doctor_cli import as_text, doctor_command
from cdt_runtime.errors import BackendError
from cdt_runtime.golden import FULL

Shell = Callable[..., tuple[int, str, str]]

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2 GHz
flags\t\t: fpu avx2 avx512f avx512_vnni amx_tile odd
processor\t: 1
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_dir: Path) -> None:
    """A folder without engines, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ort, "DRIVERS", ())


def no_engine(graph: bytes, precision: str) -> Any:
    raise BackendError("its driver is missing:\npip install it")


def test_the_graph_of_one_node_is_what_onnx_writes() -> None:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    assert model.SerializeToString() == doctor.ONE_NODE


def test_it_says_what_the_machine_has_and_what_runs(shell: Shell, cache_dir: Path) -> None:
    code, out, err = shell(doctor_command)
    lines = {line.partition(" ")[0]: line for line in out.splitlines()}
    assert (code, err) == (0, "")
    assert lines["GPU"] == "GPU          none that an NVIDIA driver tells of"
    assert lines["cache"] == f"cache        {cache_dir}"
    assert lines["bundle"] == "bundle       none: with one, the engines are tested and timed"
    assert lines["tensorrt"].startswith("tensorrt     no: backend 'tensorrt': tensorrt is not inst")
    assert lines["cuda"].endswith("pip install 'cdt-edge[gpu]', or use --backend onnxruntime")
    assert lines["onnxruntime"].startswith("onnxruntime  runs (onnxruntime")
    assert "auto" not in lines


def test_with_a_bundle_each_engine_is_tested_and_timed(shell: Shell, bundle_dir: Path) -> None:
    code, out, _ = shell(doctor_command, bundle_dir, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bundle"] == {
        "path": str(bundle_dir),
        "identity": Bundle.open(bundle_dir).identity,
        "precision": "fp32",
    }
    engines = {one["name"]: one for one in found["engines"]}
    assert [*engines] == [*BACKENDS]
    assert {name: one["works"] for name, one in engines.items()} == {
        "tensorrt": False,
        "cuda": False,
        "openvino": True,
        "onnxruntime": True,
    }
    plain = engines["onnxruntime"]
    assert 0 < plain["gap"] < FULL
    assert plain["tile_ms"] > 0
    assert found["auto"] in ("openvino", "onnxruntime")
    assert {"system", "python", "processor", "features", "cores", "memory_gib", "gpus"} <= set(
        found["machine"]
    )
    text = as_text(found)
    assert f"\nbundle       {bundle_dir} (fp32, {found['bundle']['identity']})\n" in text
    expected = f"off by at most {plain['gap']:.1e} of a range, one tile {plain['tile_ms']:.2f} ms\n"
    assert expected in text
    assert text.endswith(f"auto takes   {found['auto']}")


def test_the_newest_bundle_is_taken_and_named(
    shell: Shell, bundle_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "mine").symlink_to(bundle_dir)
    code, out, err = shell(doctor_command)
    assert code == 0
    assert err == "bundle: engines/mine (the newest; BUNDLE chooses another)\n"
    assert "\nbundle       engines/mine (fp32, " in out


def test_a_machine_where_nothing_works_is_an_error(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_runtime.doctor.open_session", no_engine)
    code, out, err = shell(doctor_command)
    assert code == 2
    assert out.endswith("its driver is missing: pip install it\n")
    assert err == "error: no engine works here: each says above why, and what to do\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "BUNDLE is empty: is a variable of your script unset?"),
        (("gone",), "gone: no such folder: give the folder that cdt-export wrote"),
        (("--build",), "--build: no bundle in ./engines to build plans for: give a BUNDLE"),
        (("--build", "gone"), "gone: no such folder: give the folder that cdt-export wrote"),
    ],
)
def test_what_can_not_be_used_is_one_line(
    shell: Shell, arguments: tuple[str, ...], message: str
) -> None:
    assert shell(doctor_command, *arguments) == (2, "", f"error: {message}\n")


def test_plans_can_not_be_built_without_tensorrt(shell: Shell, bundle_dir: Path) -> None:
    code, out, err = shell(doctor_command, "--build", bundle_dir)
    assert (code, out) == (2, "")
    assert err == (
        "error: backend 'tensorrt': tensorrt is not installed: pip install 'cdt-edge[tensorrt]', "
        "or use another --backend\n"
    )


def test_processor_and_gpu_are_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    for number in range(2):
        folder = tmp_path / "nvidia" / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"
    (tmp_path / "nvidia" / "version").write_text(version)
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nvidia")
    found = doctor.machine()
    assert found["processor"] == "Some CPU @ 2 GHz"
    assert found["features"] == ["avx2", "avx512f", "avx512_vnni", "amx_tile"]
    assert (found["gpus"], found["driver"]) == (["NVIDIA H100 80GB HBM3"] * 2, "570.86.10")
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "none")
    assert doctor.machine()["features"] == []


def test_a_gpu_and_an_engine_in_fp32_are_shown() -> None:
    engine = {
        "name": "openvino",
        "packages": {"openvino": "1.0"},
        "works": True,
        "problem": None,
        "precision": "fp32",
        "gap": 1e-5,
        "tile_ms": 2.0,
    }
    machine = {
        **{"system": "Linux", "python": "3.11", "processor": "P", "cores": 2, "memory_gib": 8.0},
        **{"features": [], "gpus": ["NVIDIA X"], "driver": "570.1"},
    }
    text = as_text(
        {
            **{"version": "1", "machine": machine, "packages": {"numpy": "2"}, "cache": None},
            **{"bundle": None, "engines": [engine], "auto": None},
        }
    )
    assert "\nGPU          NVIDIA X, driver 570.1\n" in text
    assert "\nfeatures     none of those that speed inference up\n" in text
    assert "\ncache        none: set CDT_CACHE\n" in text
    assert "passes the self-test in fp32 (openvino 1.0): off by at most 1.0e-05 of" in text
