from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from cdt_export.build import export_bundle, prove, support_prototypes
from cdt_export.graphs import Graph, build_graphs
from cdt_export.inputs import open_data, read_tiles
from cdt_export.onnx import to_onnx
from cdt_export.parity import TOLERANCES, compare_decisions, exported_chances
from cdt_runtime.backends import open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import BundleError, CheckpointError, DatasetError, ParityError
from cdt_runtime.golden import ALLOWED, self_test
from cdt_runtime.prototypes import FACTS, FITS, fit_prototypes, softmax
from cdt_train.checkpoint import load_checkpoint, save_checkpoint
from cdt_train.split_record import SplitRecord
from cdt_train.trained import Trained, load_trained

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
        "reference.safetensors",
        "split.safetensors",
    }
    for name in GRAPHS:
        model = onnx.load(bundle_dir / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(model)
        assert model.ir_version <= 10
        assert model.opset_import[0].version == 20
        assert all(not tensor.external_data for tensor in model.graph.initializer)
        assert b".py" not in model.SerializeToString()  # no path of the exporting machine


def test_8_bit_inputs_go_through_a_cast_and_nothing_else(bundle_dir: Path) -> None:
    seen = 0
    for path in sorted(bundle_dir.glob("*.onnx")):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)  # in an order that can be run
        for one in model.graph.input:
            if one.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
                takers = {node.op_type for node in model.graph.node if one.name in node.input}
                assert takers == {"Cast"}, path.name
                seen += 1
    assert seen == 2  # of the tile encoder and of the whole


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
            "ct_tokens": np.zeros((1, 8, 32), np.float32),
            "ct_present": np.zeros(1, np.float32),
            "prototypes": np.eye(classes, 32, dtype=np.float32),
            "scale": np.ones(1, np.float32),
        }
    )
    assert outputs["logits"].shape == outputs["distances"].shape == (batch, classes)
    assert outputs["embedding"].shape == (batch, 32)


LAST_BIAS = {
    "ct_encoder": "project.0.bias",
    "path_encoder": "project.0.bias",
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
    _, held_out = read_tiles(open_data(trained, None))
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=2)
    precisions = {graph.name: graph.precision_in(precision) for graph in graphs}
    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    if broken is None:
        prove(trained, graphs, sessions, held_out, precisions)
        return
    altered = change_one_weight(models[broken], LAST_BIAS[broken])
    sessions[broken] = open_session("onnxruntime", altered)
    with pytest.raises(
        ParityError, match=rf"{broken}: differs from PyTorch by .* no bundle was wr"
    ):
        prove(trained, graphs, sessions, held_out, precisions)


def test_answers_that_are_no_numbers_are_refused(
    trained: Trained, exported: tuple[str, dict[str, bytes]]
) -> None:
    precision, models = exported
    _, held_out = read_tiles(open_data(trained, None))
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=2)
    precisions = {graph.name: graph.precision_in(precision) for graph in graphs}

    class Broken:
        engine = "broken"

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nothing = np.full((len(inputs["embedding"]), 2), np.nan, np.float32)
            return {"logits": nothing, "distances": nothing}

    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    with pytest.raises(ParityError, match="head: logits is not finite"):
        prove(trained, graphs, {**sessions, "head": Broken()}, held_out, precisions)


def test_nothing_is_written_when_parity_fails(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(graph: Graph, *, fp16: bool) -> bytes:
        data = to_onnx(graph, fp16=fp16)
        return change_one_weight(data, "project.0.bias") if graph.name == "path_encoder" else data

    monkeypatch.setattr("cdt_export.build.to_onnx", sabotaged)
    with pytest.raises(ParityError):
        export_bundle(trained, tmp_path / "bad", precision="fp32", data_dir=None)
    assert list(tmp_path.iterdir()) == []


def test_encoders_in_half_precision_answer_rightly_on_a_cpu(
    bundle_dir: Path, fp16_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("path_encoder", "ct_encoder"):
        half, full = (
            sum(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer)
            / len(graph.initializer)
            for graph in (onnx.load(path / f"{name}.onnx").graph for path in (fp16_dir, bundle_dir))
        )
        assert half > 0.5
        assert full == 0
    gaps = self_test(Bundle.open(fp16_dir), "onnxruntime")
    assert max(gaps.values()) > 0  # it did compute in half precision
    monkeypatch.setitem(ALLOWED, "fp16", 1e-9)
    with pytest.raises(
        ParityError, match=r"half on onnxruntime: out_\w+ is off by .* allowed 1e-09"
    ):
        self_test(Bundle.open(fp16_dir), "onnxruntime")


def test_no_pixel_of_the_training_data_is_in_a_bundle(bundle_dir: Path, trained: Trained) -> None:
    support, held_out = read_tiles(open_data(trained, None))
    golden = np.load(bundle_dir / "golden.npz")["in_tile"]
    for tiles in (support.tiles, held_out.tiles):
        assert not any(np.array_equal(a, b) for a in golden for b in tiles.numpy())
    text = (bundle_dir / "bundle.json").read_text() + (bundle_dir / "prototypes.json").read_text()
    assert "Patient_" not in text
    assert str(bundle_dir.parent.parent) not in text


def test_paired_support_brings_its_own_patients_ct(
    trained: Trained, exported: tuple[str, dict[str, bytes]], phantom_dir: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    assert len(read_tiles(open_data(trained, data))[1].support_ct) == 0
    support, _ = read_tiles(open_data(trained, data))
    owners = [name.split("/")[1] for name in support.names]
    (data / "ct_data" / "R_002").rename(data / "ct_data" / owners[1])
    support, held_out = read_tiles(open_data(trained, data))
    assert len(held_out.support_ct) == 1
    expected = [0 if owner == owners[1] else -1 for owner in owners]
    assert held_out.support_ct_of.tolist() == expected
    precision, models = exported
    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    found = support_prototypes(trained, support, held_out, sessions, "e" * 64)
    assert found.ct_of is not None
    assert found.ct_of.tolist() == expected
    assert found.ct_tokens is not None
    tokens = sessions["ct_encoder"].run({"ct": held_out.support_ct.numpy()})["ct_tokens"]
    assert np.array_equal(found.ct_tokens, tokens)
    scales = (trained.scale, trained.scale_with_ct)
    rows = compare_decisions(
        trained.model, sessions, held_out, held_out, scales, "mean", TOLERANCES[precision]
    )
    assert [row.label_flips for row in rows] == [0, 0]
    assert max(row.max_probability_change for row in rows) < TOLERANCES[precision].probability


def test_support_tiles_come_from_outside_the_test_fold(bundle_dir: Path, trained: Trained) -> None:
    support, held_out = read_tiles(open_data(trained, None))
    assert set(support.names) & set(trained.info["split"]["test"]) == set()
    assert np.bincount(support.labels).tolist() == [2, 2]
    assert len(held_out.labels) == len(trained.info["split"]["test"])
    facts = json.loads((bundle_dir / "prototypes.json").read_text())
    assert facts["support_sha256"] == list(support.sha256)


def test_data_that_has_moved_is_found_by_option_or_said(
    trained: Trained, phantom_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(phantom_dir, tmp_path / "moved")
    support, _ = read_tiles(open_data(trained, tmp_path / "moved"))
    assert len(support.labels) == 4
    with pytest.raises(DatasetError, match=r"training data not found at .*: give --data-dir"):
        read_tiles(open_data(trained, tmp_path / "gone"))
    name = trained.info["split"]["test"][0]
    (tmp_path / "moved" / name).unlink()
    rows = (tmp_path / "moved" / "pathology_data" / "labels.csv").read_text().splitlines()
    patient, region = name.split("/")[1:3]
    kept = [row for row in rows if not row.startswith(f"{patient},{region},")]
    (tmp_path / "moved" / "pathology_data" / "labels.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(DatasetError, match="1 tiles of the training run are missing or lab"):
        read_tiles(open_data(trained, tmp_path / "moved"))


def test_labels_and_images_must_be_those_of_the_training(
    trained: Trained, phantom_dir: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    labels = data / "pathology_data" / "labels.csv"
    rows = labels.read_text()
    swapped = rows.replace("tumor_stroma", "x").replace("invasion_front", "tumor_stroma")
    labels.write_text(swapped.replace(",x", ",invasion_front"))
    with pytest.raises(DatasetError, match="48 tiles of the training run are missing or labelled"):
        read_tiles(open_data(trained, data))
    labels.write_text(rows)
    first, second = (data / name for name in trained.info["split"]["test"][:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DatasetError, match="is another image than the model was trained on"):
        read_tiles(open_data(trained, data))


def test_a_bundle_decides_by_what_calibration_found(bundle_dir: Path, trained: Trained) -> None:
    facts = json.loads((bundle_dir / FACTS).read_text())
    found = trained.calibration
    assert facts["fit"] == found["fit"]
    assert facts["ct_context"] == found["ct_context"]
    assert facts["ct_gain"] == {name: found["ct_gain"][name] for name in ("mean", "ci95", "low")}
    for name, scale in (("temperatures", "scale"), ("temperatures_with_ct", "scale_with_ct")):
        assert facts["calibration"][name] == found[name]
        assert facts[scale] == pytest.approx(found["learnt_scale"] / found[name]["2"])


@pytest.mark.parametrize("fit", FITS)
def test_decisions_are_compared_by_the_fit_of_the_evaluation(
    trained: Trained, exported: tuple[str, dict[str, bytes]], fit: str
) -> None:
    precision, models = exported
    _, held_out = read_tiles(open_data(trained, None))
    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    context = sessions["ct_encoder"].run({"ct": held_out.ct.numpy()})
    found = exported_chances(
        sessions, held_out, context["ct_tokens"], np.ones(1, np.float32), trained.scale, fit
    )
    support = sessions["path_encoder"].run({"tile": held_out.support.numpy()})
    there = {**context, "ct_present": np.ones(1, np.float32)}
    embedded = sessions["bridge"].run({**support, **there})["embedding"]
    head = {
        "prototypes": fit_prototypes(embedded, held_out.support_labels, 2, fit),
        "scale": np.array([trained.scale], np.float32),
    }
    tiles = {"tile": held_out.tiles[:4].numpy()}
    logits = sessions["tile_classifier"].run({**tiles, **there, **head})["logits"]
    assert np.allclose(found[:4], softmax(logits), atol=1e-6)
    tolerance = TOLERANCES[precision]
    rows = compare_decisions(
        *(trained.model, sessions, held_out, held_out),
        *((trained.scale, trained.scale_with_ct), fit, tolerance),
    )
    assert [row.label_flips for row in rows] == [0, 0]


def test_a_bundle_knows_its_split_without_names(bundle_dir: Path, trained: Trained) -> None:
    record = SplitRecord.from_bytes((bundle_dir / "split.safetensors").read_bytes())
    names = sorted(trained.info["tile_facts"])
    for side, places in record.sides.items():
        assert [names[place] for place in places] == trained.info["split"][side]
    facts = trained.info["tile_facts"]
    of_side = {side: [facts[n][0] for n in trained.info["split"][side]] for side in record.sides}
    assert record.known(of_side["test"]) == 0
    assert record.known(of_side["val"]) == len(of_side["val"])
    assert record.known(["0" * 64]) == 0
    with pytest.raises(BundleError, match=r"split.safetensors: can't be read .*: export again"):
        SplitRecord.from_bytes(b"junk")


def test_a_checkpoint_of_an_earlier_version_is_refused(trained_dir: Path, tmp_path: Path) -> None:
    content = load_checkpoint(trained_dir / "best_model.pt", ())
    del content["calibration"]["fit"]
    save_checkpoint(tmp_path / "old.pt", content)
    with pytest.raises(CheckpointError, match=r"old.pt: its calibration lacks fit: an earlier "):
        load_trained(tmp_path / "old.pt")


def test_an_unfinished_checkpoint_is_refused(trained_dir: Path) -> None:
    unfinished = next((trained_dir / "fold_1").glob("checkpoint_epoch_*.pt"))
    with pytest.raises(CheckpointError, match="lacks calibration, test"):
        load_trained(unfinished)
