"""Every name and signature of TensorRT and of the driver that is used exists in the real ones.

The real bindings load without a GPU once the three libraries they ask for are there; small ones
that do nothing are compiled here. What stands for TensorRT in `test_trt.py` is then held against
them: whatever call the stand-in accepts, the real one accepts.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fake_tensorrt as fake
import pytest

from cdt_runtime.backends import device

LIBRARIES = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
SHOW = """
import ctypes, inspect, json, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt
found = {}
for name, one in vars(trt).items():
    if isinstance(one, type):
        members = {n: inspect.getattr_static(one, n) for n in dir(one)}
        found[name] = {
            n: "property" if isinstance(m, property) else getattr(one, n).__doc__ or ""
            for n, m in members.items()
        }
try:
    trt.Builder(trt.Logger())
    refusal = ""
except TypeError as error:
    refusal = str(error)
print(json.dumps({
    "version": trt.__version__,
    "classes": found,
    "refusal": refusal,
    "nptype": [*inspect.signature(trt.nptype).parameters],
    "flag": 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "shape": list(trt.Dims((1, -1))),
    "same": trt.TensorIOMode.INPUT == trt.TensorIOMode.OUTPUT,
}))
"""
PLAIN = {"bool", "int", "str"}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler: the libraries that the bindings ask for can't be made")
    return found


def compiled(compiler: str, source: str, path: Path) -> Path:
    code = path.with_suffix(".c")
    code.write_text(source)
    name = f"-Wl,-soname,{path.name}"
    subprocess.run([compiler, "-shared", "-fPIC", name, "-o", path, code], check=True)
    return path


@pytest.fixture(scope="module")
def real(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The real bindings' classes with the docstring of each member, which holds its signature."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt_cu13_bindings is not installed: pip install '.[dev]'")
    major = _version().split(".")[0]
    folder = tmp_path_factory.mktemp("libraries")
    paths = [
        compiled(
            compiler,
            "".join(f"void *{one}(void) {{ return 0; }}\n" for one in names),
            folder / f"lib{library}.so.{major}",
        )
        for library, names in LIBRARIES.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *map(str, paths)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _version() -> str:
    for package in ("tensorrt_cu13_bindings", "tensorrt_cu12_bindings"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    pytest.skip("the bindings were not installed by pip: their version is unknown")


def overloads(doc: str, name: str) -> list[tuple[dict[str, bool], str]]:
    """The signatures in a docstring: whether each parameter may be left out, and the result."""
    found = []
    for given, result in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> (\S+)$", doc, re.MULTILINE):
        parts = re.split(r", (?=\w+: )", re.sub(r"<[^>]*>", "VALUE", given))
        found.append(({part.partition(":")[0]: "=" in part for part in parts if part}, result))
    return found


def gaps(kind: Any, members: dict[str, str]) -> list[str]:
    """What a class of the stand-in has that the real one lacks or takes otherwise."""
    found = []
    made = {"__init__"} if kind in fake.NAMED else set()
    for name, one in vars(kind).items():
        if name.startswith("_") and name not in made:
            continue
        if name not in members:
            found.append(f"{kind.__name__}.{name} does not exist")
        elif isinstance(one, property) != (members[name] == "property"):
            found.append(f"{kind.__name__}.{name} is called in one, and not in the other")
        elif inspect.isfunction(one) and not accepts(one, overloads(members[name], name)):
            found.append(f"{kind.__name__}.{name}: {members[name].strip()[:200]}")
    return found


def accepts(one: Any, signatures: list[tuple[dict[str, bool], str]]) -> bool:
    """Whether one of the real signatures takes all calls that a function takes."""
    asked = inspect.signature(one)
    wanted = {n: p.default is not inspect.Parameter.empty for n, p in asked.parameters.items()}
    result = asked.return_annotation
    for parameters, returns in signatures:
        shared = dict(list(parameters.items())[: len(wanted)])
        rest = list(parameters.values())[len(wanted) :]
        # What the stand-in lets a caller leave out must be free in the real one, too.
        takes = [*shared] == [*wanted] and all(shared[n] for n, free in wanted.items() if free)
        if takes and all(rest) and (result not in PLAIN or result == returns):
            return True
    return False


def kinds() -> list[Any]:
    return [one for one in (*fake.NAMED, *fake.GIVEN) if isinstance(one, type)]


def test_whatever_the_stand_in_takes_the_real_bindings_take(real: dict[str, Any]) -> None:
    absent = [one.__name__ for one in kinds() if one.__name__ not in real["classes"]]
    assert absent == []
    wrong = [gap for one in kinds() for gap in gaps(one, real["classes"][one.__name__])]
    assert "; ".join(wrong) == ""
    assert {one.name for one in fake.ILogger.Severity} <= set(real["classes"]["ILogger"])
    assert [*inspect.signature(fake.nptype).parameters] == real["nptype"]


def test_values_behave_as_they_are_used(real: dict[str, Any]) -> None:
    assert real["flag"] in (1, 2)
    assert real["shape"] == [1, -1]
    assert real["same"] is False


class Builder:
    """Wrong in every way that matters."""

    def create_network(self, flag: int = 0) -> object:
        raise NotImplementedError

    def create_builder_config(self, name: str) -> object:
        raise NotImplementedError

    def build_engine(self) -> object:
        raise NotImplementedError

    def create_optimization_profile(self) -> bool:
        raise NotImplementedError

    @property
    def reset(self) -> None:
        raise NotImplementedError


def test_a_wrong_name_parameter_or_result_would_be_seen(real: dict[str, Any]) -> None:
    found = " ".join(gaps(Builder, real["classes"]["Builder"]))
    assert "Builder.build_engine does not exist" in found
    assert "Builder.reset is called in one, and not in the other" in found
    for name in ("create_network", "create_builder_config", "create_optimization_profile"):
        assert f"Builder.{name}: {name}(" in found


def test_without_libraries_that_work_the_bindings_refuse_as_expected(real: dict[str, Any]) -> None:
    assert "factory function returned nullptr" in real["refusal"]


DRIVER = """
#include <stdio.h>
typedef void *handle;
int cuStreamBeginCapture_v2(handle s, int mode) { return printf("begin %p %d\\n", s, mode) < 0; }
int cuStreamEndCapture(handle s, handle *graph) {
  *graph = (handle)0x7d0000000010; return printf("end %p\\n", s) < 0; }
int cuGraphInstantiateWithFlags(handle *replay, handle graph, unsigned long long flags) {
  *replay = (handle)0x7d0000000020; return printf("make %p %llu\\n", graph, flags) < 0; }
int cuGraphLaunch(handle replay, handle s) { return printf("launch %p %p\\n", replay, s) < 0; }
int cuGraphDestroy(handle graph) { return printf("destroy %p\\n", graph) < 0; }
int cuGraphExecDestroy(handle replay) {
  int code = printf("forget %p\\n", replay) < 0; fflush(stdout); return code; }
"""
RECORD = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])  # under the name that the driver has
from types import SimpleNamespace
from cdt_runtime.backends.device import Recording
recording = Recording(SimpleNamespace(handle=0x7f0000000001), lambda: None)
recording.launch()
"""


def test_handles_reach_the_driver_whole(compiler: str, tmp_path: Path) -> None:
    library = compiled(compiler, DRIVER, tmp_path / device.LIBRARY)
    done = subprocess.run(
        [sys.executable, "-c", RECORD, str(library)], capture_output=True, text=True, check=True
    )
    stream, graph, replay = "0x7f0000000001", "0x7d0000000010", "0x7d0000000020"
    assert done.stdout.splitlines() == [
        f"begin {stream} 1",
        f"end {stream}",
        f"make {graph} 0",
        f"destroy {graph}",
        f"launch {replay} {stream}",
        f"forget {replay}",
    ]
    functions = set(re.findall(r"int (cu\w+)\(", DRIVER))
    assert functions == set(device.CALLS)
