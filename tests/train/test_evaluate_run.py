from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.errors import BundleError, CheckpointError, DatasetError
from cdt_train.checkpoint import load_checkpoint, save_checkpoint
from cdt_train.cli import train_command
from cdt_train.data.phantom import write_phantom
from cdt_train.deployed import shipped_model
from cdt_train.evaluate_run import SHIPPED, as_text, run_evaluation

Shell = Callable[..., tuple[int, str, str]]
ROWS = {*SHIPPED, "colour_statistics", "permuted_labels"} - {"without_encoders"}


@pytest.fixture(scope="module")
def by_torch(trained_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(run_evaluation(trained_dir / "best_model.pt")))
    return found


@pytest.fixture(scope="module")
def shipped(bundle_dir: Path, phantom_dir: Path) -> dict[str, Any]:
    return run_evaluation(bundle_dir, data_dir=phantom_dir)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another phantom hospital, whose classes are called otherwise."""
    folder = tmp_path_factory.mktemp("other") / "data"
    write_phantom(folder, seed=7, n_patients=5, n_ct=2, regions_per_class=2)
    labels = folder / "pathology_data" / "labels.csv"
    labels.write_text(labels.read_text().replace("tumor_stroma", "zone"))
    return folder


def test_a_checkpoint_gives_the_table_of_its_fold(
    by_torch: dict[str, Any], trained_dir: Path
) -> None:
    folds = json.loads((trained_dir / "metrics.json").read_text())["folds"]
    fold = next(fold for fold in folds if fold["fold"] == by_torch["fold"])
    assert set(by_torch["test"]) == ROWS
    assert by_torch["shots"] == ["1", "2"]
    assert by_torch["test"] == {row: fold["test"][row] for row in ROWS}
    assert by_torch["over_groups"] == {
        row: fold["over_groups"][row] for row in ("with_ct", "without_ct")
    }
    assert set(by_torch["differences"]) == {
        "with_ct - without_ct",
        "with_ct - wrong_ct",
        "with_ct - noise_ct",
        "without_ct - colour_statistics",
    }
    for name, by_k in by_torch["differences"].items():
        assert by_k == fold["differences"][name]


def test_a_bundle_gives_the_same_accuracies(
    by_torch: dict[str, Any], shipped: dict[str, Any]
) -> None:
    assert shipped["own_test_tiles"] is True
    assert shipped["model"].startswith("tiny (fp32, ")
    assert set(shipped["test"]) == ROWS
    for row, by_k in shipped["test"].items():
        for k, found in by_k.items():
            expected = by_torch["test"][row][k]
            for name in ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "confusion"):
                assert found[name] == expected[name]
            assert found["auc_roc"] == pytest.approx(expected["auc_roc"], abs=1e-3)
            if "nll" in expected:
                assert found["nll"] == pytest.approx(expected["nll"], abs=1e-3)
    assert shipped["differences"] == by_torch["differences"]
    assert as_text(shipped).splitlines()[:9] == as_text(by_torch).splitlines()[:9]


def test_fewer_episodes_and_another_k_can_be_asked_for(
    trained_dir: Path, phantom_dir: Path
) -> None:
    found = run_evaluation(trained_dir / "best_model.pt", shots=(3,), count=10)
    assert (found["shots"], found["episodes"]) == (["3"], 10)
    assert found["notes"] == ["no temperature was fitted for K = 3: it uses that of K = 2"]
    with pytest.raises(DatasetError, match=r"an episode takes k_shot \+ 1 = 100: lower --kshot"):
        run_evaluation(trained_dir / "best_model.pt", shots=(1, 99))


def test_data_that_has_moved_is_known_again(
    by_torch: dict[str, Any], trained_dir: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(phantom_dir, tmp_path / "moved"))
    found = run_evaluation(trained_dir / "best_model.pt", data_dir=moved)
    assert found["own_test_tiles"] is True
    assert json.loads(json.dumps(found["test"])) == by_torch["test"]


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_of_other_data_all_tiles_are_test_tiles(
    kind: str, trained_dir: Path, bundle_dir: Path, other_dir: Path
) -> None:
    path = bundle_dir if kind == "bundle" else trained_dir / "best_model.pt"
    found = run_evaluation(path, data_dir=other_dir, count=20)
    assert (found["own_test_tiles"], found["tiles"], found["groups"]) == (False, 20, 5)
    assert found["classes"] == ["invasion_front", "zone"]
    assert set(found["test"]) == ROWS
    assert found["notes"] == ["colour statistics are standardised by these tiles themselves"]
    text = as_text(found)
    assert "2-way 1-shot on 5 patients of other data: 20 tiles, 20 episodes" in text
    assert "with CT, 1-shot: accuracy " in text
    assert "over 5 patients (95 %)." in text


def test_without_ct_nothing_is_said_of_it(
    trained_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    rows = (other_dir / "pathology_data" / "labels.csv").read_text().splitlines()[1:]
    parts = [row.split(",") for row in rows]
    named = [
        f"{other_dir}/pathology_data/{patient}/{region}/tile.ome.tif,{label},{patient}"
        for patient, region, label in parts
    ]
    data = tmp_path / "labels.csv"
    data.write_text("\n".join(["path,label,patient", *named]) + "\n")
    checkpoint = trained_dir / "best_model.pt"
    found = run_evaluation(checkpoint, data_dir=data, layout="csv", count=5, shots=(1,))
    assert set(found["test"]) == {"without_ct", "colour_statistics", "permuted_labels"}
    assert "There was no CT: nothing is said about it." in as_text(found)


def test_tiles_of_the_training_are_never_test_tiles(
    trained_dir: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    labels = data / "pathology_data" / "labels.csv"
    labels.write_text(labels.read_text().replace("tumor_stroma", "other"))
    with pytest.raises(
        DatasetError, match=r"best_model.pt was trained on 24 of these 48 tiles, or chosen by them"
    ):
        run_evaluation(trained_dir / "best_model.pt", data_dir=data)


def test_data_changed_in_place_is_refused(
    trained_dir: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    content = load_checkpoint(trained_dir / "best_model.pt", ())
    content["dataset_info"]["data_dir"] = str(data)
    save_checkpoint(tmp_path / "here.pt", content)
    first, second = (data / name for name in content["dataset_info"]["split"]["test"][:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DatasetError, match=r"is not what here.pt was trained on any more: give --"):
        run_evaluation(tmp_path / "here.pt")


def test_what_is_no_model_is_said(bundle_dir: Path, phantom_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.pt: no such checkpoint: cdt-train writes"):
        run_evaluation(tmp_path / "none.pt")
    with pytest.raises(BundleError, match=r"holds no bundle.json: give the folder that cdt-export"):
        run_evaluation(tmp_path)
    with pytest.raises(
        DatasetError, match=r"tiny \(.*\): a bundle does not say where its data is: give --data-dir"
    ):
        run_evaluation(bundle_dir)
    bundle = Bundle.open(bundle_dir)
    files = {name: bundle.read(name) for name in bundle.manifest["files"]}
    training = {k: v for k, v in bundle.manifest["training"].items() if k != "recipe"}
    write_bundle(tmp_path / "old", files, {**bundle.manifest, "training": training})
    with pytest.raises(BundleError, match=r"old: its manifest lacks training.recipe: export again"):
        run_evaluation(tmp_path / "old", data_dir=phantom_dir)


def test_a_shipped_model_embeds_each_tile_in_its_own_context(bundle_dir: Path) -> None:
    model = shipped_model(Bundle.open(bundle_dir))
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 255, (5, 6, 64, 64), generator=generator).to(torch.uint8)
    tokens = model.path_encoder(tiles)
    some = torch.randn(2, *model.bridge.bank.shape[1:], generator=generator)
    own, there = some[[0, 1, 0, 1, 0]], torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    own[4] = 0
    together = model.bridge(tokens, own, there)
    for index in range(5):
        place = slice(index, index + 1)
        alone = model.bridge(tokens[place], own[place], there[place])
        assert np.allclose(alone, together[place], atol=1e-6)
    context, present = model.context(None)
    assert not context.any()
    assert torch.allclose(model.bridge(tokens[4:], context, present), together[4:], atol=1e-6)


def test_the_command_prints_tables_or_json(
    trained_dir: Path, other_dir: Path, shell: Shell
) -> None:
    command = ("evaluate", trained_dir / "best_model.pt", "--data-dir", other_dir)
    code, out, err = shell(train_command, *command, "--kshot", 1, "--kshot", 2, "--episodes", 5)
    assert code == 0, err
    for part in (
        "2-way 1-shot on 5 patients of other data: 20 tiles, 5 episodes",
        "2-way 2-shot on 5 patients of other data: 20 tiles, 5 episodes",
        "wrong patient's CT",
        "with CT against without CT, 2-shot:",
        "note: colour statistics are standardised by these tiles themselves",
        "model     best_model.pt",
    ):
        assert part in out
    code, out, _ = shell(train_command, *command, "--kshot", 1, "--episodes", 5, "--json")
    assert code == 0
    assert set(json.loads(out)["test"]) == ROWS


@pytest.mark.parametrize("name", ["evaluate", "finetune", "compare"])
def test_a_command_is_named_by_the_first_argument(name: str, shell: Shell) -> None:
    code, out, _ = shell(train_command, name, "--help")
    assert code == 0
    assert f" {name} [OPTIONS] " in out.splitlines()[0]
    _, listed, _ = shell(train_command, "--help")
    assert f"  cdt-train {name} " in listed
    assert "[KEY=VALUE ...]" in listed.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate",), "Missing argument 'MODEL'"),
        (("evaluate", "none.pt"), "none.pt: no such checkpoint"),
        (("evaluate", "none.pt", "--kshot", "0"), "Invalid value for '--kshot'"),
        (("evaluat", "none.pt"), "'evaluat': expected key=value, such as training.num_epochs=20"),
        (("--kshot", "5", "evaluate"), "'evaluate': expected key=value"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    arguments: tuple[str, ...], message: str, shell: Shell
) -> None:
    code, out, err = shell(train_command, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, cdt_train.cli, cdt_train.cli_evaluate; "
        "print(sorted({'numpy', 'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
