from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cdt_export.build import Trained, export_bundle, load_trained, prove, read_tiles
from cdt_export.graphs import Graph, build_graphs
from cdt_export.onnx import to_onnx
from cdt_runtime.backends import open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import CheckpointError, DatasetError, ParityError
from cdt_runtime.golden import self_test

GRAPHS = ("ct_encoder", "path_encoder", "bridge", "head", "tile_classifier")


@pytest.fixture(scope="module")
def trained(trained_dir: Path) -> Trained:
    made = load_trained(trained_dir / "best_model.pt")
    with torch.no_grad():
        made.model.bridge.gate.fill_(0.01)  # as open as a trained gate on unpaired data
    return made


@pytest.fixture(scope="module")
def fp16_dir(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "half"
    return export_bundle(trained, folder, precision="fp16", data_dir=None).path


def test_a_bundle_holds_every_part_in_single_files(bundle_dir: Path) -> None:
    names = {path.name for path in bundle_dir.iterdir()}
    assert names == {f"{name}.onnx" for name in GRAPHS} | {
        "bundle.json",
        "golden.npz",
        "prototypes.json",
        "prototypes.safetensors",
    }
    for name in GRAPHS:
        model = onnx.load(bundle_dir / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(model)
        assert model.ir_version <= 10
        assert model.opset_import[0].version == 20
        assert all(not tensor.external_data for tensor in model.graph.initializer)
        assert b".py" not in model.SerializeToString()  # no path of the exporting machine


def test_the_manifest_says_what_the_graphs_take_in(bundle_dir: Path) -> None:
    graphs = Bundle.open(bundle_dir).manifest["graphs"]
    assert set(graphs) == set(GRAPHS)
    for name, facts in graphs.items():
        model = onnx.load(bundle_dir / f"{name}.onnx")
        assert {value.name for value in model.graph.input} == set(facts["inputs"])
        assert {value.name for value in model.graph.output} == set(facts["outputs"])
        for value in model.graph.input:
            shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert shape == facts["inputs"][value.name]["shape"]
    assert graphs["tile_classifier"]["inputs"]["tile"] == {
        "shape": ["batch", 6, 64, 64],
        "dtype": "uint8",
    }
    assert graphs["head"]["inputs"]["prototypes"]["shape"] == ["classes", 32]
    assert graphs["head"]["outputs"]["logits"]["shape"] == ["batch", "classes"]
    assert graphs["bridge"]["outputs"]["embedding"]["shape"] == ["batch", 32]


def test_the_manifest_holds_the_parity_figures(bundle_dir: Path) -> None:
    parity = Bundle.open(bundle_dir).manifest["parity"]
    assert [row["graph"] for row in parity["graphs"]] == list(GRAPHS)
    assert all(row["cosine"] > 0.99999 for row in parity["graphs"])
    assert [row["context"] for row in parity["decisions"]] == ["without CT", "with CT"]
    assert all(row["label_flips"] == 0 and row["tiles"] > 0 for row in parity["decisions"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("classes", [2, 5])
def test_batch_and_classes_are_dynamic(bundle_dir: Path, batch: int, classes: int) -> None:
    session = open_session("onnxruntime", (bundle_dir / "tile_classifier.onnx").read_bytes())
    outputs = session.run(
        {
            "tile": np.zeros((batch, 6, 64, 64), np.uint8),
            "ct_tokens": np.zeros((1, 4, 32), np.float32),
            "ct_present": np.zeros(1, np.float32),
            "prototypes": np.eye(classes, 32, dtype=np.float32),
            "scale": np.ones(1, np.float32),
        }
    )
    assert outputs["logits"].shape == outputs["distances"].shape == (batch, classes)
    assert outputs["embedding"].shape == (batch, 32)


LAST_BIAS = {
    "ct_encoder": "project.bias",
    "path_encoder": "project.bias",
    "bridge": "value.bias",
    "tile_classifier": "value.bias",
}
"""A weight that every output hangs on, so that changing it can't go unseen in a dead channel."""


def change_one_weight(data: bytes, suffix: str) -> bytes:
    model = onnx.load_from_string(data)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(suffix))
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(trained: Trained, request: pytest.FixtureRequest) -> tuple[str, dict[str, bytes]]:
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=2)
    models = {graph.name: to_onnx(graph, fp16=request.param == "fp16") for graph in graphs}
    return request.param, models


@pytest.mark.parametrize("broken", [None, *LAST_BIAS])
def test_an_export_with_one_weight_changed_is_refused(
    trained: Trained, exported: tuple[str, dict[str, bytes]], broken: str | None
) -> None:
    precision, models = exported
    _, held_out = read_tiles(trained, None)
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=2)
    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    if broken is None:
        prove(trained, graphs, sessions, held_out, precision)
        return
    altered = change_one_weight(models[broken], LAST_BIAS[broken])
    sessions[broken] = open_session("onnxruntime", altered)
    with pytest.raises(
        ParityError, match=rf"{broken}: differs from PyTorch by .* no bundle was wr"
    ):
        prove(trained, graphs, sessions, held_out, precision)


def test_answers_that_are_no_numbers_are_refused(
    trained: Trained, exported: tuple[str, dict[str, bytes]]
) -> None:
    precision, models = exported
    _, held_out = read_tiles(trained, None)
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=2)

    class Broken:
        engine = "broken"

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nothing = np.full((len(inputs["embedding"]), 2), np.nan, np.float32)
            return {"logits": nothing, "distances": nothing}

    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    with pytest.raises(ParityError, match="head: logits is not finite"):
        prove(trained, graphs, {**sessions, "head": Broken()}, held_out, precision)


def test_nothing_is_written_when_parity_fails(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(graph: Graph, *, fp16: bool) -> bytes:
        data = to_onnx(graph, fp16=fp16)
        return change_one_weight(data, "project.bias") if graph.name == "path_encoder" else data

    monkeypatch.setattr("cdt_export.build.to_onnx", sabotaged)
    with pytest.raises(ParityError):
        export_bundle(trained, tmp_path / "bad", precision="fp32", data_dir=None)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_half_the_size_and_answers_rightly_on_a_cpu(
    bundle_dir: Path, fp16_dir: Path
) -> None:
    half, full = ((path / "tile_classifier.onnx").stat().st_size for path in (fp16_dir, bundle_dir))
    assert half < 0.7 * full
    gaps = self_test(Bundle.open(fp16_dir), "onnxruntime", tolerance=2e-2)
    assert max(gaps.values()) > 0  # it did compute in half precision
    with pytest.raises(
        ParityError, match=r"half on onnxruntime: out_\w+ is off by .* allowed 1e-09"
    ):
        self_test(Bundle.open(fp16_dir), "onnxruntime", tolerance=1e-9)


def test_no_pixel_of_the_training_data_is_in_a_bundle(bundle_dir: Path, trained: Trained) -> None:
    support, held_out = read_tiles(trained, None)
    golden = np.load(bundle_dir / "golden.npz")["in_tile"]
    for tiles in (support.tiles, held_out.tiles):
        assert not any(np.array_equal(a, b) for a in golden for b in tiles.numpy())
    text = (bundle_dir / "bundle.json").read_text() + (bundle_dir / "prototypes.json").read_text()
    assert "Patient_" not in text
    assert str(bundle_dir.parent.parent) not in text


def test_support_tiles_come_from_outside_the_test_fold(bundle_dir: Path, trained: Trained) -> None:
    support, held_out = read_tiles(trained, None)
    assert set(support.names) & set(trained.info["split"]["test"]) == set()
    assert np.bincount(support.labels).tolist() == [2, 2]
    assert len(held_out.labels) == len(trained.info["split"]["test"])
    facts = json.loads((bundle_dir / "prototypes.json").read_text())
    assert facts["support_sha256"] == list(support.sha256)


def test_data_that_has_moved_is_found_by_option_or_said(
    trained: Trained, phantom_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(phantom_dir, tmp_path / "moved")
    support, _ = read_tiles(trained, tmp_path / "moved")
    assert len(support.labels) == 4
    with pytest.raises(DatasetError, match=r"training data not found at .*: give --data-dir"):
        read_tiles(trained, tmp_path / "gone")
    name = trained.info["split"]["test"][0]
    (tmp_path / "moved" / name).unlink()
    rows = (tmp_path / "moved" / "pathology_data" / "labels.csv").read_text().splitlines()
    patient, region = name.split("/")[1:3]
    kept = [row for row in rows if not row.startswith(f"{patient},{region},")]
    (tmp_path / "moved" / "pathology_data" / "labels.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(DatasetError, match="1 tiles of the training run are missing or lab"):
        read_tiles(trained, tmp_path / "moved")


def test_labels_and_images_must_be_those_of_the_training(
    trained: Trained, phantom_dir: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    labels = data / "pathology_data" / "labels.csv"
    rows = labels.read_text()
    swapped = rows.replace("tumor_stroma", "x").replace("invasion_front", "tumor_stroma")
    labels.write_text(swapped.replace(",x", ",invasion_front"))
    with pytest.raises(DatasetError, match="48 tiles of the training run are missing or labelled"):
        read_tiles(trained, data)
    labels.write_text(rows)
    first, second = (data / name for name in trained.info["split"]["test"][:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DatasetError, match="is another image than the model was trained on"):
        read_tiles(trained, data)


def test_an_unfinished_checkpoint_is_refused(trained_dir: Path) -> None:
    unfinished = next((trained_dir / "fold_1").glob("checkpoint_epoch_*.pt"))
    with pytest.raises(CheckpointError, match="lacks calibration, test"):
        load_trained(unfinished)
