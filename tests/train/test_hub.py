"""The hub's folder: the same model back, no names in it, and a card with what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cdt_export.cli import export_command
from cdt_runtime.errors import CheckpointError
from cdt_train.cli import train_command
from cdt_train.hub import load_pretrained
from cdt_train.trained import load_trained

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(trained_dir: Path) -> Path:
    return trained_dir / "best_model.pt"


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path, shell: Shell) -> Path:
    code, out, err = shell(train_command, "save-pretrained", checkpoint, tmp_path / "mine")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"next      hf upload NAME/mine {tmp_path / 'mine'}"
    return tmp_path / "mine"


def test_the_same_model_comes_back(checkpoint: Path, saved: Path) -> None:
    ours, theirs = load_trained(checkpoint), load_trained(saved)
    state = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[name])
    assert ours.recipe == theirs.recipe
    assert ours.preprocess == theirs.preprocess
    assert (ours.scale, ours.temperatures) == (theirs.scale, theirs.temperatures)
    assert ours.test == theirs.test


def test_no_name_and_no_path_is_in_it(checkpoint: Path, saved: Path) -> None:
    text = "".join(
        path.read_text("utf-8") for path in saved.iterdir() if path.suffix != ".safetensors"
    )
    assert "Patient_" not in text
    assert str(checkpoint.parent.parent) not in text
    assert "Patient_" not in (saved / "model.safetensors").read_bytes()[:100_000].decode("latin-1")


def test_the_card_says_what_was_measured(checkpoint: Path, saved: Path) -> None:
    text = (saved / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    test = load_trained(checkpoint).test
    metrics = {
        one["type"]: one["value"] for one in facts["model-index"][0]["results"][0]["metrics"]
    }
    context = load_trained(checkpoint).calibration["ct_context"]
    own = test["with_ct" if context else "without_ct"]["2"]
    assert metrics["accuracy"] == pytest.approx(own["accuracy"], abs=1e-4)
    assert metrics["ece"] == pytest.approx(own["ece"], abs=1e-4)
    assert f"{test['permuted_labels']['2']['accuracy']:.3f} ± " in body
    assert "Research use only" in body
    assert "## Over all folds" in body


def test_the_hubs_own_library_reads_the_card(saved: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "cdt-edge"
    assert {one.metric_type for one in card.data.eval_results} >= {"accuracy", "ece"}


def test_with_names_it_can_be_exported(
    checkpoint: Path, saved: Path, phantom_dir: Path, tmp_path: Path, shell: Shell
) -> None:
    whole = tmp_path / "whole"
    assert shell(train_command, "save-pretrained", checkpoint, whole, "--with-names")[0] == 0
    words = ("--output", tmp_path / "bundle", "--data-dir", phantom_dir)
    code, _, err = shell(export_command, "--checkpoint", whole, *words)
    assert (code, err) == (0, "")
    code, _, err = shell(export_command, "--checkpoint", saved, *words)
    assert code == 2
    assert "saved without its split: cdt-train save-pretrained --with-names keeps it" in err


def test_what_is_damaged_or_anothers_is_refused(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for change, said in (
        ({"best_metric": 2.0}, "does not fit its hash"),
        ({"model_type": "bert"}, "no model of cdt-train"),
    ):
        (saved / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=said):
            load_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged: fetch it again"):
        load_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        load_pretrained(tmp_path)


def test_a_folder_that_is_not_empty_stays(checkpoint: Path, saved: Path, shell: Shell) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    code, _, err = shell(train_command, "save-pretrained", checkpoint, saved)
    assert code == 2
    assert "is there and not empty: give another folder" in err
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
