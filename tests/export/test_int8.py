"""Encoders in int8: what is calibrated, what is kept, and what an engine makes of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from cdt_export import int8, int8_choice
from cdt_export.build import export_all, open_all, prove
from cdt_export.cli import export_command
from cdt_export.graphs import Graph, behind_encoder, build_graphs
from cdt_export.inputs import TrainingData, open_data, read_calibration, read_tiles
from cdt_export.int8 import Literal, join, quantise
from cdt_export.int8_choice import Calibration, Mixed, choose, time_shares, too_slow
from cdt_export.onnx import to_onnx
from cdt_export.parity import TOLERANCES, HeldOut
from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import ParityError
from cdt_runtime.golden import EIGHT_BIT, golden_inputs, golden_outputs, self_test
from cdt_train.trained import Trained, load_trained

FAST = {"openvino": 0.7, "onnxruntime": 0.5}
INT8 = {"path_encoder", "tile_classifier", "ct_encoder"}
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    """Graphs may differ by more: a model of a few steps holds tiles so near that rounding shows."""
    with pytest.MonkeyPatch.context() as patch:
        own = dataclasses.replace(TOLERANCES["int8"], relative=0.4, cosine=0.9)
        patch.setitem(TOLERANCES, "int8", own)
        yield


@pytest.fixture(scope="module")
def trained(trained_dir: Path) -> Trained:
    made = load_trained(trained_dir / "best_model.pt")
    with torch.no_grad():
        made.model.bridge.gate.fill_(0.01)  # as open as a trained gate on unpaired data
    return made


@pytest.fixture(scope="module")
def data(trained: Trained) -> TrainingData:
    return open_data(trained, None)


@pytest.fixture(scope="module")
def held_out(data: TrainingData) -> HeldOut:
    return read_tiles(data)[1]


@pytest.fixture(scope="module")
def calibration(data: TrainingData, held_out: HeldOut) -> Calibration:
    return read_calibration(data, held_out.ct)


@pytest.fixture(scope="module")
def graphs(trained: Trained) -> dict[str, Graph]:
    made = build_graphs(trained.model, trained.preprocess, n_classes=2)
    return {graph.name: graph for graph in made}


@pytest.fixture(scope="module")
def models(graphs: dict[str, Graph]) -> dict[str, bytes]:
    return export_all(graphs.values(), fp16=False)


@pytest.fixture(scope="module")
def encoders(models: dict[str, bytes], calibration: Calibration) -> dict[str, bytes]:
    return {name: quantise(models[name], calibration.inputs(name)) for name in int8_choice.ENCODERS}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where int8 gains: no test hangs on a time."""
    monkeypatch.setattr(int8_choice, "time_shares", lambda *_: FAST)


@pytest.fixture(scope="module")
def exported(
    trained_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, click.testing.Result]:
    """A bundle, and what the command that wrote it said."""
    folder = tmp_path_factory.mktemp("engines") / "eight"
    words = ["--checkpoint", trained_dir / "best_model.pt", "--int8", "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_choice, "time_shares", lambda *_: FAST)
        said = click.testing.CliRunner().invoke(export_command, [str(word) for word in words])
    assert said.exit_code == 0
    return folder, said


@pytest.fixture(scope="module")
def int8_dir(exported: tuple[Path, click.testing.Result]) -> Path:
    return exported[0]


def test_only_the_training_side_calibrates(
    trained: Trained, held_out: HeldOut, calibration: Calibration, phantom_dir: Path, tmp_path: Path
) -> None:
    split = trained.info["split"]
    assert len(calibration.tiles) == len(split["train"])
    for side in ("val", "test"):
        apart = open_data(trained, None).tiles(split[side]).tiles
        assert not any(torch.equal(a, b) for a in calibration.tiles for b in apart)
    assert len(calibration.ct) == 2
    assert not any(torch.equal(volume, held_out.ct[0]) for volume in calibration.ct)
    moved = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    patient = split["test"][0].split("/")[1]
    (moved / "ct_data" / "R_002").rename(moved / "ct_data" / patient)
    assert len(read_calibration(open_data(trained, moved), held_out.ct).ct) == 1


def test_the_choice_of_tiles_is_seeded(
    data: TrainingData, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_export.inputs.CALIBRATION_TILES", 3)
    first, again = (read_calibration(data, held_out.ct).tiles for _ in range(2))
    assert len(first) == 3
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", int8_choice.ENCODERS)
def test_all_convolutions_but_the_first_are_int8(
    models: dict[str, bytes], encoders: dict[str, bytes], name: str
) -> None:
    model = onnx.load_from_string(encoders[name])
    onnx.checker.check_model(model)
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not model.metadata_props
    makers = {node.output[0]: node for node in model.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, *rest = (node for node in model.graph.node if node.op_type == "Conv")
    assert first.input[1] in tensors
    for node in rest:
        flow, weight = (makers[name] for name in node.input[:2])
        assert flow.op_type == weight.op_type == "DequantizeLinear"
        assert tensors[flow.input[2]].data_type == TensorProto.UINT8
        assert tensors[weight.input[0]].data_type == TensorProto.INT8
        assert len(tensors[weight.input[1]].dims) == 1  # a scale for each channel
        for zero in (flow.input[2], weight.input[2]):
            assert not numpy_helper.to_array(tensors[zero]).any()
    assert len(encoders[name]) < len(models[name])


def test_it_says_nothing_to_the_user(
    models: dict[str, bytes], calibration: Calibration, capfd: pytest.CaptureFixture[str]
) -> None:
    quantise(models["path_encoder"], calibration.inputs("path_encoder")[:1])
    assert capfd.readouterr() == ("", "")


def shift(graph: bytes, exact: bytes, calibration: Calibration) -> float:
    """How far the mean token is off over the calibration tiles."""
    inputs = {"tile": calibration.tiles.numpy()}
    gap = Literal(graph).run(inputs)["tile_tokens"] - Literal(exact).run(inputs)["tile_tokens"]
    return float(np.linalg.norm(gap.mean(axis=(0, 1))))


def test_biases_take_back_the_shift_of_rounding(
    models: dict[str, bytes],
    encoders: dict[str, bytes],
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "path_encoder"
    monkeypatch.setattr(int8, "correct_biases", lambda *_: None)
    plain = quantise(models[name], calibration.inputs(name))
    before, after = (shift(graph, models[name], calibration) for graph in (plain, encoders[name]))
    assert after < before / 2


def test_the_tile_classifier_holds_the_very_same_encoder(
    models: dict[str, bytes], encoders: dict[str, bytes], graphs: dict[str, Graph]
) -> None:
    decider = to_onnx(behind_encoder(graphs["tile_classifier"]), fp16=False)
    joined = Literal(join(encoders["path_encoder"], decider))
    inputs = {name: value.numpy() for name, value in graphs["tile_classifier"].inputs.items()}
    inputs["tile"] = np.concatenate([inputs["tile"], inputs["tile"][:1]])  # another batch
    inputs["prototypes"] = np.eye(4, inputs["prototypes"].shape[1], dtype=np.float32)
    found = joined.run(inputs)
    tokens = Literal(encoders["path_encoder"]).run({"tile": inputs["tile"]})
    context = {name: inputs[name] for name in ("ct_tokens", "ct_present")}
    bridged = Literal(models["bridge"]).run({**tokens, **context})
    head = {name: inputs[name] for name in ("prototypes", "scale")}
    expected = {
        **bridged,
        **Literal(models["head"]).run({"embedding": bridged["embedding"], **head}),
    }
    assert found["logits"].shape == (3, 4)
    for name, values in expected.items():
        assert np.allclose(found[name], values, atol=1e-5)


def chosen(
    trained: Trained,
    graphs: dict[str, Graph],
    models: dict[str, bytes],
    held_out: HeldOut,
    calibration: Calibration,
) -> Mixed:
    listed = list(graphs.values())

    def passes(models: Any, precisions: Any) -> dict[str, Any]:
        return prove(trained, listed, open_all(models), held_out, precisions)

    return choose(listed, models, calibration, passes)


@pytest.fixture
def case(
    trained: Trained,
    graphs: dict[str, Graph],
    models: dict[str, bytes],
    held_out: HeldOut,
    calibration: Calibration,
) -> tuple[Any, ...]:
    return trained, graphs, models, held_out, calibration


def test_what_is_slower_in_one_engine_stays_in_float(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shares(model: bytes, quantised: bytes, inputs: Any) -> dict[str, float]:
        return {"openvino": 0.5, "onnxruntime": 1.15} if "ct" in inputs else FAST

    monkeypatch.setattr(int8_choice, "time_shares", shares)
    mixed = chosen(*case)
    reasons = {verdict.encoder: (verdict.kept, verdict.reason) for verdict in mixed.verdicts}
    assert reasons == {
        "path_encoder": (True, ""),
        "ct_encoder": (False, "takes 1.15 (onnxruntime) of the time in float, allowed 0.95"),
    }
    assert {name for name, kind in mixed.precisions.items() if kind == "int8"} == {
        "path_encoder",
        "tile_classifier",
    }
    assert mixed.models["ct_encoder"] == case[2]["ct_encoder"]
    rows = {row["graph"]: row["precision"] for row in mixed.parity["graphs"]}
    assert rows == mixed.precisions


def stretched(graph: bytes, weight: str) -> bytes:
    """The graph with the weights of one convolution half as large again."""
    model = onnx.load_from_string(graph)
    scale = next(t for t in model.graph.initializer if t.name == f"{weight}_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.5, scale.name))
    return model.SerializeToString()


@pytest.mark.usefixtures("fast")
def test_what_changes_decisions_stays_in_float(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(graph: bytes, inputs: Any) -> bytes:
        made = quantise(graph, inputs)
        return stretched(made, "stages.1.1.0.weight") if "tile" in inputs[0] else made

    monkeypatch.setattr(int8_choice, "quantise", sabotaged)
    mixed = chosen(*case)
    path, ct = mixed.verdicts
    assert (path.encoder, path.kept, ct.kept) == ("path_encoder", False, True)
    assert path.reason.startswith("path_encoder: differs from PyTorch by ")
    assert "no bundle was written" not in path.reason
    assert mixed.precisions["tile_classifier"] == "fp32"


@pytest.mark.usefixtures("fast")
def test_without_a_second_ct_that_encoder_stays_in_float(case: tuple[Any, ...]) -> None:
    *rest, calibration = case
    mixed = chosen(*rest, Calibration(calibration.tiles, calibration.ct[:0]))
    assert mixed.verdicts[1].reason == "no training CT but the one it would be proved on"
    assert mixed.precisions["ct_encoder"] == "fp32"


def test_where_nothing_gains_nothing_is_written(
    trained_dir: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_choice, "time_shares", lambda *_: {"onnxruntime": 0.99})
    best, output = trained_dir / "best_model.pt", tmp_path / "none"
    code, out, err = shell(export_command, "--checkpoint", best, "--int8", "--output", output)
    why = "takes 0.99 (onnxruntime) of the time in float, allowed 0.95"
    assert (code, out) == (2, "")
    assert err == (
        f"error: nothing to gain from --int8: path_encoder: {why}; ct_encoder: {why}: no bundle "
        f"was written: leave it out\n"
    )
    assert not output.exists()


def test_a_model_that_fails_in_float_is_not_laid_on_int8(case: tuple[Any, ...]) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise ParityError("bridge: differs")

    with pytest.raises(ParityError, match="bridge: differs"):
        choose(list(case[1].values()), case[2], case[4], fails)


def test_time_is_measured_in_every_cpu_engine(
    models: dict[str, bytes], graphs: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_choice, "ROUNDS", 1)
    monkeypatch.setattr(int8_choice, "OPENINGS", 1)
    inputs = {name: value.numpy() for name, value in graphs["path_encoder"].inputs.items()}
    shares = time_shares(models["path_encoder"], models["path_encoder"], inputs)
    assert set(shares) == {"openvino", "onnxruntime"}
    assert min(shares.values()) > 0
    assert too_slow({"openvino": 0.95, "onnxruntime": 0.2}) == ""


def test_the_manifest_says_what_is_in_int8(int8_dir: Path) -> None:
    manifest = Bundle.open(int8_dir).manifest
    kinds = {name: facts["precision"] for name, facts in manifest["graphs"].items()}
    assert kinds == {name: "int8" if name in INT8 else "fp32" for name in kinds}
    assert manifest["precision"] == "int8"
    assert {row["graph"]: row["precision"] for row in manifest["parity"]["graphs"]} == kinds
    assert [row["label_flips"] for row in manifest["parity"]["decisions"]] == [0, 0]
    assert {name: facts["time"] for name, facts in manifest["int8"]["encoders"].items()} == {
        "path_encoder": FAST,
        "ct_encoder": FAST,
    }


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_each_engine_computes_an_int8_bundle_as_it_is_written(
    int8_dir: Path, phantom_dir: Path, backend: str, cache_dir: Path
) -> None:
    assert max(self_test(Bundle.open(int8_dir), backend, "fp32").values()) < EIGHT_BIT
    tiles = sorted((phantom_dir / "new_patient").glob("*.tif"))
    classifier = FewShotClassifier.open(int8_dir, backend=backend, precision="fp32")
    assert len(classifier.predict(tiles, phantom_dir / "new_patient" / "ct")) == len(tiles)


def test_golden_values_are_those_of_the_int8_graphs(int8_dir: Path, trained: Trained) -> None:
    bundle = Bundle.open(int8_dir)
    literal = {name: Literal(bundle.read(f"{name}.onnx")) for name in bundle.manifest["graphs"]}
    stored = np.load(int8_dir / "golden.npz")
    inputs = golden_inputs(trained.preprocess)
    found = golden_outputs(inputs, lambda name, values: literal[name].run(values))
    assert all(np.array_equal(stored[name], values) for name, values in found.items())


def test_an_engine_that_computes_int8_wrongly_is_refused(int8_dir: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(int8_dir)
    files = {name: bundle.read(name) for name in bundle.manifest["files"]}
    files["ct_encoder.onnx"] = stretched(files["ct_encoder.onnx"], "stages.1.0.0.weight")
    wrong = write_bundle(tmp_path / "wrong", files, bundle.manifest)
    with pytest.raises(ParityError, match=r"wrong on onnxruntime: out_ct_tokens is off by .* 0.05"):
        self_test(wrong, "onnxruntime")


def test_the_command_says_which_encoders_are_in_int8(
    exported: tuple[Path, click.testing.Result],
) -> None:
    folder, said = exported
    assert said.stderr == ""
    for name in int8_choice.ENCODERS:
        kept = "int8, 0.50 (onnxruntime), 0.70 (openvino) of the time in float"
        assert f"{name:<16} {kept}\n" in said.stdout
    assert "calibrated       on 12 training tiles, 2 CT volumes\n" in said.stdout
    assert f"bundle    {folder} (int8, " in said.stdout
    assert Bundle.open(folder).manifest["int8"]["calibration"] == {"tiles": 12, "ct": 2}


def test_only_one_precision_can_be_asked_for(shell: Shell) -> None:
    code, out, err = shell(export_command, "--fp16", "--int8")
    assert (code, out) == (2, "")
    assert err == "error: --fp16 and --int8: give one, --fp16 for a GPU or --int8 for a CPU\n"
