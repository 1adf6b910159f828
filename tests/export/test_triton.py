"""Triton's model repository: what it says is what the graphs are, and it computes what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cdt_export.cli import export_command
from cdt_export.triton import ENSEMBLE, check_triton, write_triton
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import ExportError

pytest.importorskip("tritonclient")

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def repository(bundle_dir: Path, tmp_path: Path) -> tuple[Path, Bundle]:
    bundle = Bundle.open(bundle_dir)
    write_triton(bundle, tmp_path / "triton")
    return tmp_path / "triton", bundle


def test_it_is_written_and_checked(bundle_dir: Path, tmp_path: Path, shell: Shell) -> None:
    folder = tmp_path / "triton"
    code, out, err = shell(export_command, "--bundle", bundle_dir, "--triton", folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"triton    {folder}: model cdt, up to 32 tiles a call"
    names = {path.name for path in folder.iterdir()}
    assert names == {"path_encoder", "bridge", "head", "ct_encoder", "tile_classifier", ENSEMBLE}
    assert (folder / ENSEMBLE / "1").is_dir()
    assert "dynamic_batching" in (folder / "path_encoder" / "config.pbtxt").read_text()
    assert "dynamic_batching" not in (folder / "bridge" / "config.pbtxt").read_text()
    assert list(tmp_path.iterdir()) == [folder]
    code, out, err = shell(export_command, "--bundle", bundle_dir, "--triton", folder)
    assert code == 2
    assert err == f"error: --triton {folder}: is there and not empty: give another folder\n"


def test_json_gives_the_differences(bundle_dir: Path, tmp_path: Path, shell: Shell) -> None:
    words = ("--bundle", bundle_dir, "--triton", tmp_path / "triton", "--json")
    found = json.loads(shell(export_command, *words)[1])
    assert found["ensemble_gaps"].keys() == {"logits", "distances"}
    assert max(found["ensemble_gaps"].values()) < 1e-3


@pytest.mark.parametrize(
    ("model", "old", "new", "said"),
    [
        ("path_encoder", "TYPE_UINT8", "TYPE_FP32", "the configuration says"),
        ("bridge", "dims: 1\n", "dims: 2\n", "the configuration says"),
        ("head", 'name: "logits"', 'name: "scores"', "the configuration says"),
        ("head", "output {", "output [", "can't be read"),
        ("bridge", 'name: "bridge"', 'name: "brigde"', "has another name"),
        ("path_encoder", "max_batch_size: 32", "", "the configuration says"),
        (ENSEMBLE, 'value: "ct_tokens"', 'value: "tile_tokens"', "can't take ct_tokens"),
        (ENSEMBLE, 'name: "distances"', 'name: "nearness"', "nothing makes nearness"),
        (ENSEMBLE, 'platform: "ensemble"', 'platform: "ensemble"\nmax_batch_size: 4', "a request"),
    ],
)
def test_what_does_not_fit_is_refused(
    repository: tuple[Path, Bundle], model: str, old: str, new: str, said: str
) -> None:
    folder, bundle = repository
    path = folder / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ExportError, match=said):
        check_triton(folder, bundle)


def test_a_graph_that_computes_something_else_is_refused(
    repository: tuple[Path, Bundle],
) -> None:
    import onnx
    from onnx import numpy_helper

    folder, bundle = repository
    path = folder / "path_encoder" / "1" / "model.onnx"
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * -1, weight.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"cdt: .* is off by .*, allowed 0\.001"):
        check_triton(folder, bundle)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bundle", "x"), "--bundle: only with --triton"),
        (("--triton", "x", "--encoders", "medsiglip"), "--triton: for bundles"),
    ],
)
def test_options_that_do_not_go_together(shell: Shell, words: tuple[str, ...], said: str) -> None:
    code, _, err = shell(export_command, *words)
    assert code == 2
    assert said in err
