"""A site's tiles beside the training tiles, and the stain brought back."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cdt_export.build import export_bundle
from cdt_runtime import FewShotClassifier
from cdt_runtime.adaptation import Adaptation, densities, fit_adaptation
from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.cli import infer_command
from cdt_runtime.doctor_cli import doctor, drift_command
from cdt_runtime.drift import Drift, Shares
from cdt_runtime.enroll_cli import enroll_command
from cdt_runtime.errors import PrototypeError
from cdt_runtime.tile import read_tile
from cdt_train.config import load_recipe
from cdt_train.run import run_training
from cdt_train.trained import load_trained

Shell = Callable[..., tuple[int, str, str]]
Tile = NDArray[np.uint8]


def brightfield(path: Path) -> Tile:
    """Three of a phantom tile's markers as stains on white."""
    return 255 - np.asarray(read_tile(path).pixels, np.uint8)[:, :, :3] // 2


@pytest.fixture(scope="module")
def rgb_tiles(phantom_dir: Path) -> list[tuple[str, str, Tile]]:
    """Patient, class and pixels of each."""
    with (phantom_dir / "pathology_data" / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    folder = phantom_dir / "pathology_data"
    return [
        (row["patient"], row["label"], brightfield(tile))
        for row in rows
        for tile in sorted(folder.glob(f"{row['patient']}/{row['region']}*"))
    ]


@pytest.fixture(scope="module")
def rgb_bundle(
    rgb_tiles: list[tuple[str, str, Tile]],
    tiny_recipe: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle of a tiny run on RGB tiles."""
    root = tmp_path_factory.mktemp("rgb")
    (root / "data").mkdir()
    lines = ["path,label,group"]
    for number, (patient, label, tile) in enumerate(rgb_tiles):
        Image.fromarray(tile).save(root / "data" / f"{number}.png")
        lines.append(f"{number}.png,{label},{patient}")
    (root / "data" / "manifest.csv").write_text("\n".join(lines), "utf-8")
    recipe = load_recipe(None, (*tiny_recipe, "data.layout=csv"))
    run_training(recipe, data_dir=root / "data", output_dir=root / "models", resume=False)
    trained = load_trained(root / "models" / "best_model.pt")
    return export_bundle(trained, root / "rgb", precision="fp32", data_dir=None).path


@pytest.fixture(scope="module")
def tiles(rgb_tiles: list[tuple[str, str, Tile]]) -> list[Tile]:
    return [tile for _, _, tile in rgb_tiles]


def stained(tile: Tile) -> Tile:
    density = -np.log(np.maximum(tile / 255, 1 / 255))
    return np.rint(255 * np.exp(-density * np.array([0.7, 0.8, 0.6]) - 0.2)).astype(np.uint8)


@pytest.fixture
def site(tiles: list[Tile], tmp_path: Path) -> Callable[[Callable[[Tile], Tile]], Path]:
    def write(change: Callable[[Tile], Tile]) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        for number, tile in enumerate(tiles):
            Image.fromarray(change(tile)).save(folder / f"{number}.png")
        return folder

    return write


def test_an_adaptation_undoes_a_stain() -> None:
    rng = np.random.default_rng(0)
    theirs = [rng.integers(60, 250, (3, 32, 32), dtype=np.uint8) for _ in range(30)]
    ours = [stained(tile.transpose(1, 2, 0)).transpose(2, 0, 1) for tile in theirs]
    known = np.stack([densities(tile) for tile in theirs])
    site = np.stack([densities(tile) for tile in ours])
    found = fit_adaptation(site, known[:, 0].mean(axis=0), known[:, 1].mean(axis=0))
    assert found.gain == pytest.approx((1 / 0.7, 1 / 0.8, 1 / 0.6), rel=0.03)
    back = found(ours[0])
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - theirs[0]).max() <= 6
    fractions = found(ours[0].astype(np.float32) / 255)
    assert np.abs(255 * fractions - back).max() <= 0.51
    assert Adaptation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_an_adaptation_out_of_range_is_refused() -> None:
    with pytest.raises(PrototypeError, match="out of range"):
        Adaptation.from_dict({"gain": [0.0], "offset": [0.0], "tiles": 1})
    with pytest.raises(PrototypeError, match="out of range"):
        Adaptation.from_dict({"gain": [1.0], "offset": [0.0, 0.0], "tiles": 1})


def a_drift(before: float, after: float | None, *accuracies: float) -> Drift:
    known = accuracies or (None, None)
    mended = None if after is None else Shares(after, 0.0, known[1])
    return Drift(50, 0, bool(accuracies), 0.04, Shares(before, 0.0, known[0]), mended, None)


@pytest.mark.parametrize(
    ("drift", "words"),
    [
        (a_drift(0.1, 0.0), "as in training"),
        (a_drift(0.9, 0.05), "recentring is advised"),
        (a_drift(0.9, 0.4), "recentring is not advised"),
        (a_drift(0.9, 0.05, 0.9, 0.8), "recentring is not advised"),
        (a_drift(0.9, 0.05, 0.8, 0.9), "recentring is advised"),
        (a_drift(0.9, None), "RGB tiles alone"),
    ],
)
def test_what_is_advised(drift: Drift, words: str) -> None:
    assert words in drift.verdict


def test_a_stain_is_found_adapted_to_and_undone(
    shell: Shell,
    rgb_bundle: Path,
    tiles: list[Tile],
    site: Callable[..., Path],
    tmp_path: Path,
    cache_dir: Path,
) -> None:
    own = write_copy(rgb_bundle, tmp_path)
    folder = site(stained)
    words = ("--bundle", own, "--backend", "onnxruntime")
    code, out, _ = shell(drift_command, folder, *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["advised"]
    assert found["before"]["unlike"] > 0.5
    assert found["after"]["unlike"] < 0.12
    answers = ("--no-ct", folder / "0.png", "--json", *words)
    before = shell(infer_command, *answers)[1]
    code, out, _ = shell(enroll_command, "--adapt", folder, *words)
    assert code == 0
    assert f"written   adapted to {len(tiles)} tiles" in out
    adapted = shell(infer_command, *answers)[1]
    assert json.loads(adapted)["unlikeness"] < json.loads(before)["unlikeness"]
    code, _, err = shell(enroll_command, "--adapt", folder, *words)
    assert code == 2
    assert "adapted to a site already" in err
    assert shell(enroll_command, "--undo", "--bundle", own)[0] == 0
    again = json.loads(shell(infer_command, *answers)[1])
    assert again["probabilities"] == json.loads(before)["probabilities"]


def write_copy(bundle: Path, folder: Path) -> Path:
    opened = Bundle.open(bundle)
    files = {name: opened.read(name) for name in opened.manifest["files"]}
    return write_bundle(folder / "engines" / "own", files, opened.manifest).path


def test_a_site_like_training_is_left_alone(
    shell: Shell, rgb_bundle: Path, site: Callable[..., Path], cache_dir: Path
) -> None:
    folder = site(lambda tile: tile)
    words = ("--bundle", rgb_bundle, "--backend", "onnxruntime")
    code, out, _ = shell(drift_command, folder, *words)
    assert code == 0
    assert "verdict   as in training: nothing is to be done" in out
    code, _, err = shell(enroll_command, "--adapt", folder, *words)
    assert code == 2
    assert "--adapt: as in training" in err


def test_markers_are_not_recentred(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    words = ("--bundle", bundle_dir, "--backend", "onnxruntime")
    code, out, _ = shell(drift_command, phantom_dir / "pathology_data", *words)
    assert code == 0
    assert "unlike training" in out
    code, _, err = shell(drift_command, phantom_dir / "new_patient", *words)
    assert code == 2
    assert "at least 20 are needed" in err
    code, _, err = shell(drift_command, tmp_path / "nowhere", *words)
    assert code == 2
    assert "expected a folder of tiles" in err


def test_the_doctor_knows_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cdt-doctor", "drift", "--help"])
    with pytest.raises(SystemExit) as ended:
        doctor()
    assert ended.value.code == 0
    assert "TILES_DIR" in capsys.readouterr().out


def test_an_adapted_classifier_says_nothing_else_of_a_blank_tile(
    rgb_bundle: Path, cache_dir: Path
) -> None:
    classifier = FewShotClassifier.open(rgb_bundle, backend="onnxruntime")
    strong = Adaptation((5.0,) * 3, (0.0,) * 3, 20)
    classifier.prototypes = replace(classifier.prototypes, adaptation=strong)
    blank = np.random.default_rng(0).integers(238, 243, (64, 64, 3), dtype=np.uint8)
    assert classifier.predict([blank])[0].reason == "no tissue: every channel is almost flat"
