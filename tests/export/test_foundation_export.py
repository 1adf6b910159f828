"""Foundation encoders exported, quantised, and shipped in a bundle that listens to them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper, numpy_helper
from PIL import Image

from cdt_export import foundation
from cdt_export.build import export_bundle
from cdt_export.cli import export_command
from cdt_export.foundation import export_encoder, labelled_tiles
from cdt_export.weight_only import METHODS, quantise, split_gemm
from cdt_runtime.backends import open_session
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import ExportError, TileError
from cdt_train.config import load_recipe
from cdt_train.data.phantom import write_phantom
from cdt_train.encoders.foundation import FoundationEncoder
from cdt_train.encoders.registry import ENCODERS, TINY_RANDOM, load_encoder
from cdt_train.evaluate_run import run_evaluation
from cdt_train.run import run_training
from cdt_train.trained import load_trained

HAIDEF = ("medsiglip", "medgemma", "path-foundation")
WITHOUT_OPTIONAL = [
    key for key, entry in ENCODERS.items() if not set(entry.card.packages) & {"timm", "monai"}
]
CONVOLUTIONS = ("medicalnet", "ct-fm")
"""For the methods with fewer than 8 bits their weights stay in 8."""

LEAST = {"none": 0.99999, "fp16": 0.99999, "int8": 0.999, "int8-qdq": 0.999, "int4": 0.97}
SMALLER = {"fp16": 0.85, "int8": 0.8, "int8-qdq": 0.8, "int4": 0.8, "nf4": 0.75}


@lru_cache
def _exported(encoder: FoundationEncoder, export: Any = foundation._exported) -> bytes:
    data: bytes = export(encoder)[1].SerializeToString()
    return data


@lru_cache
def random_encoder(key: str) -> FoundationEncoder:
    return load_encoder(key, TINY_RANDOM)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ENCODERS)
def test_an_exported_encoder_says_what_it_said(
    key: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ENCODERS[key].card.packages:
        pytest.importorskip(library)
    monkeypatch.setattr(  # once, not for every method
        foundation, "_exported", lambda one: ("once", onnx.load_from_string(_exported(one)))
    )
    encoder = random_encoder(key)
    exported = export_encoder(encoder, method)
    report = exported.report
    assert report["embedding"]["min_cosine"] >= LEAST.get(method, 0.9)
    assert report["origin"] == "random-weights"
    if method != "none":
        assert report["nodes_covered"] == 1.0
        plain = onnx.load_from_string(_exported(encoder)).ByteSize()
        assert plain - report["bytes"] >= (1 - SMALLER[method]) * report["bytes_before"]
    images = foundation.trial_images(encoder.card.input)
    session = open_session("onnxruntime", exported.onnx)
    one, all_ = (session.run({"images": part})["embedding"] for part in (images[:1], images))
    assert np.allclose(one[0], all_[0], atol=1e-4)  # any number of images
    domains = {node.domain for node in onnx.load_from_string(exported.onnx).graph.node}
    own = method in ("int8", "int4", "nf4") and key not in CONVOLUTIONS
    assert ("com.microsoft" in domains) == own


def test_optimum_exports_what_it_knows() -> None:
    ways = {
        key: export_encoder(load_encoder(key, TINY_RANDOM)).report["exported_by"]
        for key in WITHOUT_OPTIONAL
    }
    assert ways["medsiglip"] == "optimum"
    assert ways["medgemma"] == "torch.onnx"


def gemm(**options: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shape = (64, 96) if options.get("transB") else (96, 64)
    weight = numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.normal(size=64).astype(np.float32), "b")
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", **options)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", float32, ["n", 96])],
        [helper.make_tensor_value_info("y", float32, ["n", 64])],
        [weight, bias],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("turned", [0, 1])
def test_gemm_is_covered_too(turned: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)
    expected = open_session("onnxruntime", gemm(transB=turned).SerializeToString()).run({"x": x})
    split = split_gemm(gemm(transB=turned))
    assert [node.op_type for node in split.graph.node] == ["MatMul", "Add"]
    found = open_session("onnxruntime", split.SerializeToString()).run({"x": x})
    assert np.allclose(found["y"], expected["y"], atol=1e-4)
    made, coverage = quantise(gemm(transB=turned), "int8")
    assert coverage.nodes == 1.0
    assert "MatMulNBits" in {node.op_type for node in made.graph.node}


def test_what_is_scaled_stays_a_gemm_and_too_little_is_refused() -> None:
    scaled = split_gemm(gemm(alpha=2.0))
    assert [node.op_type for node in scaled.graph.node] == ["Gemm"]
    with pytest.raises(
        ExportError, match="--quantize int8: covers 0% of the weights, at least 40%"
    ):
        quantise(gemm(alpha=2.0), "int8")


def test_an_encoder_that_says_the_same_of_all_is_refused() -> None:
    encoder = load_encoder("medgemma", TINY_RANDOM)
    for weight in encoder.module.state_dict().values():
        weight.zero_()
    with pytest.raises(ExportError, match="encoder medgemma: says the same of every image"):
        export_encoder(encoder)


def test_an_encoder_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundation, "LIMIT", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds 2: give --quantize int8"):
        export_encoder(load_encoder("medgemma", TINY_RANDOM))


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_with_one_wrong_weight_is_refused(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = foundation._exported

    def damaged(encoder: Any) -> tuple[str, onnx.ModelProto]:
        way, model = export(encoder)
        weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        values = numpy_helper.to_array(weight).copy()
        values[: len(values) // 2] *= -1
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        return way, model

    encoder = load_encoder("medsiglip", TINY_RANDOM)
    export_encoder(encoder, method)
    monkeypatch.setattr(foundation, "_exported", damaged)
    with pytest.raises(ExportError, match=f"encoder medsiglip: in {method} its embeddings have a"):
        export_encoder(encoder, method)


def test_convolutions_are_kept_in_8_bits_by_output() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4, 3, 3)).astype(np.float32) * np.logspace(-3, 1, 6)[
        :, None, None, None
    ].astype(np.float32)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        "g",
        [helper.make_tensor_value_info("x", float32, [1, 4, 9, 9])],
        [helper.make_tensor_value_info("y", float32, [1, 6, 7, 7])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    plain = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    x = rng.normal(size=(1, 4, 9, 9)).astype(np.float32)
    expected = open_session("onnxruntime", plain).run({"x": x})["y"]
    for method in ("int8", "int8-qdq", "int4", "nf4"):
        made, coverage = quantise(onnx.load_from_string(plain), method)
        assert coverage.nodes == coverage.bytes == 1.0
        found = open_session("onnxruntime", made.SerializeToString()).run({"x": x})["y"]
        for one, two in zip(expected[0], found[0], strict=True):  # small outputs, too
            assert np.abs(one - two).max() < 0.02 * np.abs(one).max()


def test_a_bad_export_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(foundation.LEAST_COSINE, "int4", 0.99999)
    with pytest.raises(ExportError, match=r"in int4 its embeddings have a cosine of 0\.9\d+ with"):
        export_encoder(load_encoder("medsiglip", TINY_RANDOM), "int4")


def write_tiles(folder: Path, patients: int, side: int = 96) -> None:
    """Coarse and fine blots: what tells the classes apart is no colour."""
    rng = np.random.default_rng(0)
    for patient in range(patients):
        for label, cell in (("tumor", 6), ("stroma", 16)):
            place = folder / label / f"P{patient:02d}"
            place.mkdir(parents=True)
            for index in range(2):
                coarse = rng.random((side // cell, side // cell))
                blots = coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:, :, None]
                noise = rng.normal(0, 8, (side, side, 3))
                pixels = np.clip(200 - 80 * blots + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{label}{index}.png")


def test_the_command_exports_encoders_alone(tmp_path: Path) -> None:
    write_tiles(tmp_path / "tiles", 1)
    for place in (tmp_path / "tiles").glob("*/P00/*.png"):
        place.rename(place.parents[1] / place.name)
    for label in ("tumor", "stroma"):
        extra = Image.open(tmp_path / "tiles" / label / f"{label}0.png").transpose(0)
        extra.save(tmp_path / "tiles" / label / "2.png")
        (tmp_path / "tiles" / label / "P00").rmdir()
    words = [
        *("--encoders", "medsiglip,path-foundation", "--quantize", "int8"),
        *("--weights", "medsiglip=tiny-random", "--weights", "path-foundation=tiny-random"),
        *("--tiles", str(tmp_path / "tiles"), "--output", str(tmp_path / "out")),
    ]
    shown = CliRunner().invoke(export_command, words, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "medsiglip        random-weights  int8" in shown.output
    folder = tmp_path / "out" / "encoder_medsiglip-int8"
    assert {path.name for path in folder.iterdir()} == {
        *("encoder.onnx", "card.json", "report.json", "NOTICE.txt")
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["few_shot"]["tiles"] == 6
    assert report["few_shot"]["k"] == 2
    assert abs(report["few_shot"]["change"]) <= 0.1
    notice = (folder / "NOTICE.txt").read_text()
    assert "weights: random-weights" in notice
    assert "https://developers.google.com/health-ai-developer-foundations/terms" in notice
    with pytest.raises(ExportError, match=r"--tiles .*: expected 2 classes or more"):
        labelled_tiles(tmp_path / "nothing")
    lone = CliRunner().invoke(export_command, ["--weights", "medsiglip=x"])
    assert "--weights and --tiles: only with --encoders" in lone.output


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (("--weights", "uni=x"), "uni is not among --encoders medsiglip,medgemma: add it there"),
        (("--weights", "medsiglip"), "--weights 'medsiglip': expected KEY=PATH"),
    ],
)
def test_weights_are_given_by_key(line: tuple[str, ...], reason: str) -> None:
    found = CliRunner().invoke(export_command, ["--encoders", "medsiglip, medgemma", *line])
    assert found.exit_code == 2
    assert reason in found.output


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that listens to all three, trained for a moment on phantom CT and drawn tiles."""
    home = tmp_path_factory.mktemp("listening")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDT_CACHE", str(home / "cache"))
        write_phantom(home / "phantom", n_patients=2, n_ct=2, regions_per_class=1)
        write_tiles(home / "tiles" / "pathology_data", 9)
        weights = ", ".join(f"{key}: {TINY_RANDOM}" for key in HAIDEF)
        recipe = load_recipe(
            None,
            [
                *("data.image_size=96", "model.feature_dim=32", "model.use_haidef=true"),
                *(f"model.encoder_weights={{{weights}}}", "training.folds=[1]"),
                *("training.ssl_epochs=1", "training.ssl_steps=1", "training.encoder_epochs=1"),
                *("training.encoder_steps=8", "training.num_epochs=1", "training.k_shot=2"),
                *("training.episodes_per_epoch=6", "training.n_query=2", "training.eval_shots=[1]"),
                *("training.val_episodes=10", "training.test_episodes=30"),
                *("training.test_queries=2", "training.precision=fp32"),
            ],
        )
        report = run_training(
            recipe,
            data_dir=home / "tiles",
            ct_dir=home / "phantom" / "ct_data",
            output_dir=home / "model",
            resume=False,
        )
        trained = load_trained(home / "model" / "best_model.pt")
        bundle = export_bundle(
            trained, home / "bundle", precision="fp32", data_dir=None, quantize="int8"
        )
        yield home, report, bundle


@pytest.mark.slow
def test_training_hears_the_encoders_and_says_what_they_bring(listening: Any) -> None:
    home, report, _ = listening
    assert {"encoders masked", "foundation features"} <= set(report["rows"].values())
    found = load_trained(home / "model" / "best_model.pt")
    assert [one["origin"] for one in found.info["encoders"]] == ["random-weights"] * 3
    learnt = found.model.tile_features.project[0][1].weight
    fresh = load_trained(home / "model" / "best_model.pt").model
    assert torch.equal(learnt, fresh.tile_features.project[0][1].weight)
    assert found.model.bridge.gate.abs() > 1e-4  # there was something to open for


@pytest.mark.slow
def test_the_bundle_holds_and_names_them_and_so_does_every_answer(listening: Any) -> None:
    home, _, bundle = listening
    assert [one["origin"] for one in bundle.manifest["encoders"]] == ["random-weights"] * 3
    assert "encoder_medsiglip.txt" in bundle.manifest["files"]
    assert bundle.manifest["encoder_reports"][0]["quantize"] == "int8"
    assert "medsiglip" in bundle.manifest["licences"]
    classifier = FewShotClassifier.open(bundle.path, backend="onnxruntime")
    tile = next((home / "tiles").rglob("*.png"))
    ct = next((home / "phantom" / "ct_data").iterdir())
    (answer,) = classifier.predict([tile], ct=ct)
    assert "encoder medgemma: random-weights, it has learnt nothing" in answer.warnings
    assert answer.ct is not None
    (alone,) = classifier.predict([tile])
    pixels = np.asarray(Image.open(tile))
    (array,) = classifier.predict([pixels])
    assert array.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


@pytest.mark.slow
def test_what_encoders_say_counts_and_one_that_is_missing_is_masked(listening: Any) -> None:
    home, _, bundle = listening
    classifier = FewShotClassifier.open(bundle.path, backend="onnxruntime")
    tiles = sorted((home / "tiles").rglob("*.png"))[:4]
    heard = classifier.embed(tiles)
    del classifier.encoders.cards["medsiglip"]
    masked = classifier.embed(tiles)
    assert not np.allclose(heard, masked, atol=1e-6)
    classifier.encoders.cards.clear()
    assert not np.allclose(masked, classifier.embed(tiles), atol=1e-7)


@pytest.mark.slow
def test_pytorch_and_the_bundle_give_the_same_table(
    listening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _, bundle = listening
    monkeypatch.setenv("CDT_CACHE", str(home / "cache"))
    ct = home / "phantom" / "ct_data"
    ours = run_evaluation(home / "model" / "best_model.pt")
    shipped = run_evaluation(bundle.path, data_dir=home / "tiles", ct_dir=ct)
    assert shipped["own_test_tiles"]
    for row in ("with_ct", "without_ct", "encoders masked"):
        key = "without_encoders" if row == "encoders masked" else row
        first, second = (one["test"][key]["2"]["accuracy"] for one in (ours, shipped))
        assert first == pytest.approx(second, abs=0.03)  # weights in int8


@pytest.mark.slow
def test_a_multiplex_tile_is_refused_in_words(listening: Any) -> None:
    _, _, bundle = listening
    classifier = FewShotClassifier.open(bundle.path, backend="onnxruntime")
    with pytest.raises(TileError, match="has the channels DAPI, CD8, CD3; foundation encoders"):
        classifier.encoders.images(np.zeros((8, 8, 3), np.uint8), 8, ("DAPI", "CD8", "CD3"), "t")


@pytest.mark.slow
def test_int8_graphs_are_for_models_without_encoders(listening: Any) -> None:
    home, _, _ = listening
    trained = load_trained(home / "model" / "best_model.pt")
    with pytest.raises(ExportError, match="--int8: not for a model with foundation encoders"):
        export_bundle(trained, home / "other", precision="int8", data_dir=None)
