from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cdt_train.cli_finetune import compare_command, finetune_command

Shell = Callable[..., tuple[int, str, str]]

QUICK = ("--layout", "medmnist", "--epochs", "1", "--batch-size", "8", "--no-augment")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thin and thick slabs, as MedMNIST 3D stores shapes."""
    rng = np.random.default_rng(0)

    def slabs(count: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 2
        volumes = np.zeros((count, 16, 16, 16), np.uint8)
        for number, (volume, label) in enumerate(zip(volumes, labels, strict=True)):
            volume[15, row + number // 16, number % 16] = 255  # no two alike
            start, width = rng.integers(2, 6), rng.integers(6, 12)
            volume[start : start + 2 + 4 * label, 2 : 2 + width, 2:12] = 255
        return volumes, labels[:, None].astype(np.uint8)

    path = tmp_path_factory.mktemp("shapes") / "slabmnist3d.npz"
    (train, train_labels), (val, val_labels) = slabs(24, 0), slabs(12, 8)
    np.savez(
        path,
        train_images=train,
        train_labels=train_labels,
        val_images=val,
        val_labels=val_labels,
    )
    return path


def test_finetune_prints_figures_and_keeps_the_model(
    shapes: Path, tmp_path: Path, shell: Shell
) -> None:
    code, out, err = shell(finetune_command, shapes, *QUICK, "--output-dir", tmp_path / "a")
    assert code == 0, err
    assert "12 images of val; no test split: the number of epochs is fixed" in out
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["auc", "accuracy"]
    content = torch.load(tmp_path / "a" / "finetuned.pt", weights_only=True)
    assert content["backbone"] == "shape3d"
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["items"] == 12
    code, _, err = shell(finetune_command, shapes, *QUICK, "--output-dir", tmp_path / "a")
    assert code == 2
    assert "a holds a run: --output-dir names another folder" in err


def test_weights_of_one_run_start_another(shapes: Path, tmp_path: Path, shell: Shell) -> None:
    folder = tmp_path / "first"
    shell(finetune_command, shapes, *QUICK, "--output-dir", folder)
    code, out, err = shell(
        *(finetune_command, shapes, *QUICK, "--json", "--mode", "linear", "--dev-share", "0.25"),
        *("--weights", folder / "finetuned.pt", "--output-dir", tmp_path / "second"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["reported"] == "dev"
    assert "tensors left out that the backbone lacks" in err


def test_compare_prints_one_table_and_goes_on(shapes: Path, tmp_path: Path, shell: Shell) -> None:
    command = (
        *(compare_command, shapes, *QUICK, "--seeds", "0", "--ssl", "--ssl-epochs", "1"),
        *("--output-dir", tmp_path),
    )
    code, out, err = shell(*command)
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()[:4]] == [
        "start",
        "scratch",
        "ssl",
        "ssl permuted",
    ]
    code, again, err = shell(*command, "--json")
    assert code == 0
    assert err.count("taken up from") == 4
    assert [row["arm"] for row in json.loads(again)["rows"]] == ["scratch", "ssl", "ssl permuted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--modes", "full,half"), "--modes: 'half' is none of linear, full, frt"),
        (("--seeds", "0,0"), "--seeds: '0,0': expected different whole numbers, such as 0,1,2"),
        (("--seeds", "a"), "--seeds: 'a': expected different whole numbers, such as 0,1,2"),
        (("--weights", "x.pt"), "--weights x.pt: expected NAME=PATH, such as imagenet=weights.pt"),
        (("--weights", "ssl=x.pt"), "--weights ssl=x.pt: the name ssl is taken: give another"),
        (("--weights", "a=none.pt"), "none.pt: no such weights file: --weights takes an existing"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    options: tuple[str, str], message: str, shapes: Path, tmp_path: Path, shell: Shell
) -> None:
    code, out, err = shell(compare_command, shapes, *QUICK, *options, "--output-dir", tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, cdt_train.cli_finetune; "
        "print(sorted({'numpy', 'torch', 'accelerate'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
