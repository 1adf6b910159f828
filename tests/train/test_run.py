from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from cdt_runtime.errors import CheckpointError, DatasetError, TrainingError
from cdt_runtime.markers import MARKERS
from cdt_runtime.preprocess import Preprocess
from cdt_train.cli import train_command
from cdt_train.config import DataRecipe, load_recipe
from cdt_train.data import LabelledTile, read_hospital
from cdt_train.data.arrays import choose_preprocess, load_ct, survey_tiles
from cdt_train.rows import CALIBRATED, ROWS
from cdt_train.run import run_training

Tiny = tuple[str, ...]
Shell = Callable[..., tuple[int, str, str]]

FIGURES = {"accuracy", "balanced_accuracy", "macro_f1", "auc_roc", "cohen_kappa", "mcc", "ece"}


def test_a_run_writes_what_users_of_the_field_expect(trained_dir: Path) -> None:
    pretrained = torch.load(trained_dir / "ct_encoder_pretrained.pt", weights_only=True)
    known = {"model_state_dict", "ssl_history", "config", "dataset_info", "content_sha256"}
    assert set(pretrained) == known
    assert len(pretrained["ssl_history"]) == 2
    best = torch.load(trained_dir / "best_model.pt", weights_only=True)
    assert set(best) >= {
        "epoch",
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "best_metric",
        "config",
        "calibration",
    }
    for fold in (1, 2):
        folder = trained_dir / f"fold_{fold}"
        assert (folder / "checkpoint_epoch_0002.pt").is_file()
        for name in ("curves_views.png", "curves_tiles.png", "curves.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (trained_dir / "curves_ssl.png").is_file()


def test_the_figures_hold_every_metric_for_every_row(trained_dir: Path) -> None:
    report = json.loads((trained_dir / "metrics.json").read_text())
    assert report["phantom"] is True
    assert "phantom data (generated with seed 1, no patients)" in report["data"]
    own = [row for row in ROWS if row not in ("without_encoders", "foundation_features")]
    assert list(report["over_folds"]) == own
    for row, by_k in report["over_folds"].items():
        assert set(by_k) == {"1", "2"}
        claimed = FIGURES if row in CALIBRATED else FIGURES - {"ece"}
        assert all(claimed <= set(found) for found in by_k.values())
    assert [fold["fold"] for fold in report["folds"]] == [1, 2]
    for fold in report["folds"]:
        assert fold["test"]["with_ct"]["1"]["episodes"] == 50
        assert set(fold["calibration"]["temperatures"]) == {"1", "2"}


def test_no_patient_is_on_two_sides_of_a_fold(trained_dir: Path) -> None:
    tested = []
    for fold in (1, 2):
        path = trained_dir / f"fold_{fold}" / "best_model.pt"
        split = torch.load(path, weights_only=True)["dataset_info"]["split"]
        patients = {side: {name.split("/")[1] for name in names} for side, names in split.items()}
        assert patients["train"] & patients["val"] == set()
        assert (patients["train"] | patients["val"]) & patients["test"] == set()
        assert sum(len(names) for names in split.values()) == 48
        tested += split["test"]
    assert len(tested) == len(set(tested)) == 48


def test_the_best_model_is_chosen_by_validation(trained_dir: Path) -> None:
    report = json.loads((trained_dir / "metrics.json").read_text())
    scores = {fold["fold"]: fold["validation"]["best_metric"] for fold in report["folds"]}
    assert scores[report["best_fold"]] == max(scores.values())
    best = torch.load(trained_dir / "best_model.pt", weights_only=True)
    assert best["dataset_info"]["fold"] == report["best_fold"]


def test_the_gate_of_unpaired_data_all_but_rests(trained_dir: Path) -> None:
    report = json.loads((trained_dir / "metrics.json").read_text())
    assert all(0 < abs(fold["gate"]) < 1e-3 for fold in report["folds"])


def test_a_ct_encoder_may_be_brought_along(
    trained_dir: Path, phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    from cdt_train.data.load import read_data
    from cdt_train.engine import Engine
    from cdt_train.pretrain import pretrain

    given = trained_dir / "ct_encoder_pretrained.pt"
    own = torch.load(given, weights_only=True)["model_state_dict"]
    engine = Engine.start("cpu", "fp32", 1, None)
    for overrides, fits in (((), True), (("model.feature_dim=64",), False)):
        recipe = load_recipe(None, [*tiny_recipe, *overrides, f"model.ct_encoder={given}"])
        data = read_data(recipe, phantom_dir, None)
        if fits:
            found = pretrain(recipe, data.ct, tmp_path / "a", False, engine, data.info)
            assert all(torch.equal(found[key], own[key]) for key in own)
        else:
            with pytest.raises(CheckpointError, match="weights do not fit the model of this"):
                pretrain(recipe, data.ct, tmp_path / "b", False, engine, data.info)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    trained_dir: Path,
    phantom_dir: Path,
    tiny_recipe: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cdt_train.episodic import EpisodicPhase

    recipe = load_recipe(None, tiny_recipe)
    whole = EpisodicPhase.step

    def killed(self: EpisodicPhase, index: int, progress: float) -> dict[str, torch.Tensor]:
        if index == 3 and "phase 3" in self.name:
            raise KeyboardInterrupt
        return whole(self, index, progress)

    output = tmp_path / "models"
    monkeypatch.setattr(EpisodicPhase, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, data_dir=phantom_dir, output_dir=output, resume=False)
    monkeypatch.setattr(EpisodicPhase, "step", whole)
    report = run_training(recipe, data_dir=phantom_dir, output_dir=output, resume=True)
    assert report == json.loads((trained_dir / "metrics.json").read_text())
    first, second = (
        torch.load(folder / "best_model.pt", weights_only=True)["model_state_dict"]
        for folder in (trained_dir, output)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_is_only_reported_again(
    trained_dir: Path, phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(trained_dir, tmp_path / "copy"))
    recipe = load_recipe(None, tiny_recipe)
    report = run_training(recipe, data_dir=phantom_dir, output_dir=copy, resume=True)
    assert report == json.loads((trained_dir / "metrics.json").read_text())


def test_an_earlier_run_is_never_overwritten(
    trained_dir: Path, phantom_dir: Path, tiny_recipe: Tiny
) -> None:
    recipe = load_recipe(None, tiny_recipe)
    with pytest.raises(TrainingError, match=r"holds a run: --resume goes on with it, --output-dir"):
        run_training(recipe, data_dir=phantom_dir, output_dir=trained_dir, resume=False)
    other = load_recipe(None, [*tiny_recipe, "training.seed=9"])
    with pytest.raises(CheckpointError, match=r"training\.seed=0, now 9: resume with the same rec"):
        run_training(other, data_dir=phantom_dir, output_dir=trained_dir, resume=True)


def test_a_run_that_never_began_claims_nothing(
    phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    recipe = load_recipe(None, [*tiny_recipe, "training.k_shot=30"])
    with pytest.raises(DatasetError, match="an episode takes k_shot"):
        run_training(recipe, data_dir=phantom_dir, output_dir=tmp_path / "models", resume=False)
    assert not (tmp_path / "models").exists()


def test_other_data_are_not_resumed(
    trained_dir: Path, phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    recipe = load_recipe(None, tiny_recipe)
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    run = Path(shutil.copytree(trained_dir, tmp_path / "run"))
    assert run_training(recipe, data_dir=data, output_dir=run, resume=True)["seed"] == 0
    assert run_training(recipe, data_dir=None, output_dir=run, resume=True)["phantom"] is True
    labels = data / "pathology_data" / "labels.csv"
    labels.write_text(labels.read_text().replace("Patient_001", "Patient_009"))
    (data / "pathology_data" / "Patient_001").rename(data / "pathology_data" / "Patient_009")
    with pytest.raises(CheckpointError, match=r"was trained on other data than .* holds now"):
        run_training(recipe, data_dir=data, output_dir=run, resume=True)


def test_the_same_image_under_two_patients_is_refused(
    phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    tiles = [
        next((data / "pathology_data" / p).rglob("*.tif")) for p in ("Patient_001", "Patient_002")
    ]
    tiles[1].write_bytes(tiles[0].read_bytes())
    with pytest.raises(DatasetError, match="are the same image under two patients"):
        run_training(
            load_recipe(None, tiny_recipe),
            data_dir=data,
            output_dir=tmp_path / "models",
            resume=False,
        )


def test_dark_tiles_of_sixteen_bits_are_not_taken_for_bytes(tmp_path: Path) -> None:
    tiles = []
    for name in ("a", "b"):
        pixels = np.random.default_rng(0).integers(0, 200, (6, 64, 64), dtype=np.uint16)
        metadata = {"axes": "CYX", "Channel": {"Name": list(MARKERS)}}
        tifffile.imwrite(
            tmp_path / f"{name}.tif", pixels, ome=True, photometric="minisblack", metadata=metadata
        )
        tiles.append(LabelledTile(tmp_path / f"{name}.tif", name, name))
    survey = survey_tiles(tiles, 64, tmp_path, lambda items, _: items)
    preprocess = choose_preprocess(survey, DataRecipe())
    assert (preprocess.tile_dtype, preprocess.tile_bits) == ("float32", 10)
    array = preprocess.tile(pixels.transpose(1, 2, 0), 16, name="a")
    assert not preprocess.is_blank(array)


def test_labels_that_do_not_exist_are_not_made_up(
    phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    (data / "pathology_data" / "labels.csv").unlink()
    with pytest.raises(DatasetError, match="patient,region,label") as caught:
        run_training(
            load_recipe(None, tiny_recipe),
            data_dir=data,
            output_dir=tmp_path / "models",
            resume=False,
        )
    assert "\n" not in str(caught.value)


def test_an_unreadable_tile_or_series_is_named(
    phantom_dir: Path, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    recipe = load_recipe(None, tiny_recipe)
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    tile = next((data / "pathology_data" / "Patient_003").rglob("*.tif"))
    whole = tile.read_bytes()
    tile.write_bytes(whole[:1000])
    with pytest.raises(DatasetError, match=r"pathology_data/Patient_003/region_\d+/tile\.ome\.tif"):
        run_training(recipe, data_dir=data, output_dir=tmp_path / "a", resume=False)
    tile.write_bytes(whole)
    sorted((data / "ct_data" / "R_002").rglob("*.dcm"))[10].unlink()
    ct, warnings = load_ct(
        read_hospital(data), Preprocess(channels=("R",)), data, lambda items, _: items
    )
    assert ct.patients == ("R_001", "R_003")
    assert len(warnings) == 1
    assert warnings[0].startswith("ct_data/R_002/20000101/SERIES: left out: slice gap")


def test_the_command_prints_the_table_and_the_next_step(
    trained_dir: Path,
    phantom_dir: Path,
    tiny_recipe: Tiny,
    tmp_path: Path,
    shell: Shell,
) -> None:
    copy = Path(shutil.copytree(trained_dir, tmp_path / "copy"))
    code, out, _ = shell(
        train_command, "--data-dir", phantom_dir, "--output-dir", copy, "--resume", *tiny_recipe
    )
    assert code == 0
    for part in (
        "2-way 1-shot on test patients: mean of 2 fold(s), 50 episodes each",
        "2-way 2-shot on test patients: mean of 2 fold(s), 50 episodes each",
        "wrong patient's CT",
        "colour statistics",
        "with CT against without CT, 2-shot:",
        "Phantom data: these figures say that the pipeline learns, nothing of patients.",
        "next      cdt-export --checkpoint",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kshott", "5"), "No such option '--kshott'. Did you mean '--kshot'?"),
        (("--kshot", "0"), "Invalid value for '--kshot'"),
        (("training.ksot=5",), "training.ksot: unknown key, did you mean training.k_shot?"),
        (("--config", "none.yaml"), "recipe none.yaml: can't be read"),
        (("--data-dir", "none"), "none: no such folder: --data-dir holds ct_data/ and pathology_"),
        (("training.device=cuda",), "training.device=cuda: torch finds no GPU here"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Shell,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(train_command, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
