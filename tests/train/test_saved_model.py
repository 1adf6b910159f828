"""Path Foundation's SavedModel to ONNX."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper

from cdt_runtime.backends import open_session
from cdt_runtime.errors import CheckpointError, MissingDependencyError
from cdt_train.cli_encoders import convert_command
from cdt_train.encoders.registry import load_encoder
from cdt_train.encoders.saved_model import convert, named, repair_erfc


def graph(nodes: list[Any], kind: int = TensorProto.FLOAT, outputs: int = 1) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(f"y{n}", kind, ["n", 4]) for n in range(outputs)]
    made = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, ["n", 4])], ends)
    if kind != TensorProto.FLOAT:
        made.value_info.append(helper.make_tensor_value_info("x", kind, ["n", 4]))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT, "f4"), (TensorProto.DOUBLE, "f8")])
def test_what_no_engine_runs_is_written_by_what_all_run(kind: int, dtype: str) -> None:
    nodes = [
        helper.make_node("Erfc", ["x"], ["a"], "first"),
        helper.make_node("Erfc", ["a"], ["y0"], "second"),
    ]
    model = graph(nodes, kind)
    if kind == TensorProto.DOUBLE:
        model.graph.value_info.append(helper.make_tensor_value_info("a", kind, ["n", 4]))
        model.graph.value_info.append(helper.make_tensor_value_info("y0", kind, ["n", 4]))
    repaired = repair_erfc(model)
    assert [node.op_type for node in repaired.graph.node] == ["Erf", "Sub", "Erf", "Sub"]
    onnx.checker.check_model(repaired)
    if kind == TensorProto.DOUBLE:
        assert repaired.graph.initializer[0].data_type == TensorProto.DOUBLE
        return  # ONNX Runtime has no Erf in float64 on a CPU
    x = np.linspace(-2, 2, 8).reshape(2, 4).astype(dtype)
    expected = np.vectorize(lambda value: math.erfc(math.erfc(value)))(x)
    found = open_session("onnxruntime", repaired.SerializeToString()).run({"x": x})["y0"]
    assert np.abs(found - expected).max() < 1e-5


def test_a_graph_without_it_stays() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y0"])])
    assert repair_erfc(model).SerializeToString() == model.SerializeToString()
    assert not model.graph.initializer


def test_its_one_input_and_output_get_their_names() -> None:
    renamed = named(graph([helper.make_node("Relu", ["x"], ["y0"])]))
    x = np.array([[-1.0, 2, -3, 4]], np.float32)
    run = open_session("onnxruntime", renamed.SerializeToString()).run
    assert run({"images": x})["embedding"].tolist() == [[0, 2, 0, 4]]
    two = [helper.make_node(kind, ["x"], [f"y{n}"]) for n, kind in enumerate(("Relu", "Neg"))]
    with pytest.raises(CheckpointError, match="takes 1 inputs and gives 2: expected one of each"):
        named(graph(two, outputs=2))


def test_without_tensorflow_or_a_model_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "cdt_train.encoders.saved_model.find_spec"
    monkeypatch.setattr(place, lambda name: None if name == "tensorflow" else True)
    with pytest.raises(
        MissingDependencyError, match=r"tensorflow not installed: pip install 'cdt-e"
    ):
        convert(tmp_path, tmp_path / "out.onnx")
    monkeypatch.setattr(place, lambda name: True)
    with pytest.raises(
        CheckpointError, match=r"holds no saved_model.pb: give the folder of the SavedModel"
    ):
        convert(tmp_path, tmp_path / "out.onnx")


def test_the_converted_encoder_is_loaded_and_tells_where_it_is_missing(tmp_path: Path) -> None:
    model = named(graph([helper.make_node("Identity", ["x"], ["y0"])]))
    (tmp_path / "path_foundation.onnx").write_bytes(model.SerializeToString())
    encoder = load_encoder("path-foundation", tmp_path)
    assert encoder.card.origin == "weights"
    images = torch.rand(10, 4)
    assert torch.equal(encoder.encode(images).embedding, images)
    (tmp_path / "path_foundation.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"path_foundation.onnx: .*can't load the graph"):
        load_encoder("path-foundation", tmp_path)
    (tmp_path / "path_foundation.onnx").unlink()
    with pytest.raises(
        CheckpointError, match=r"a folder with path_foundation.onnx; then cdt-train convert"
    ):
        load_encoder("path-foundation", tmp_path)


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_a_saved_model_says_in_onnx_what_it_said(tmp_path: Path) -> None:
    import tensorflow

    class StandsForTheGatedModel(tensorflow.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.weight = tensorflow.Variable(tensorflow.random.normal((3, 384), seed=1))

        @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 224, 224, 3])])
        def serve(self, inputs: Any) -> Any:
            x = tensorflow.reduce_mean(inputs, [1, 2]) @ self.weight
            return {"output_0": x * tensorflow.math.erfc(-x)}

    made = StandsForTheGatedModel()
    tensorflow.saved_model.save(made, str(tmp_path), signatures={"serving_default": made.serve})
    shown = CliRunner().invoke(convert_command, ["path-foundation", str(tmp_path)])
    assert shown.exit_code == 0
    assert "differs from TensorFlow by at most" in shown.output
