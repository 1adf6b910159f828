"""What the runtime is made of, as scanners read it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from cdt_runtime.doctor_cli import doctor, sbom_command
from cdt_runtime.sbom import installed_parts

Shell = Callable[..., tuple[int, str, str]]


def test_it_is_valid_and_whole(shell: Shell) -> None:
    code, out, err = shell(sbom_command)
    assert (code, err) == (0, "")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(out) is None
    found = json.loads(out)
    by_name = {one["name"]: one for one in found["components"]}
    assert {"numpy", "click", "pydicom", "imagecodecs", "pillow", "safetensors"} <= set(by_name)
    assert {"onnxruntime-gpu", "onnxruntime"} & set(by_name)
    assert not {"torch", "pytest", "pip", "scipy"} & set(by_name)
    codecs = {one["name"]: one["version"] for one in by_name["imagecodecs"]["components"]}
    assert {"openjpeg", "charls", "libjpeg_turbo", "libwebp", "zlib_ng", "lz4"} <= set(codecs)
    assert all(version[0].isdigit() for version in codecs.values() if len(version) != 7)
    needs = {one["ref"]: one.get("dependsOn", []) for one in found["dependencies"]}
    assert any(ref.startswith("pkg:pypi/numpy@") for ref in needs["runtime"])
    assert by_name["click"]["purl"].startswith("pkg:pypi/click@")


def test_licences_are_a_table(shell: Shell) -> None:
    code, out, err = shell(sbom_command, "--licences")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.startswith("click ") and "BSD" in line for line in lines)
    assert any(line.startswith("  openjpeg ") and line.endswith("in imagecodecs") for line in lines)
    # What must be given on with its source is not among the dependencies.
    assert not [line for line in lines if "GPL" in line and "LGPL" not in line]


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert {part.inside for part in installed_parts()} == {None}


def test_without_the_library_the_cure_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("cyclonedx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    monkeypatch.setattr(sys, "argv", ["cdt-doctor", "sbom"])
    with pytest.raises(SystemExit) as caught:
        doctor()
    assert caught.value.code == 2
    assert "pip install 'cdt-edge[sbom]'" in capsys.readouterr().err
