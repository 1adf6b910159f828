from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import net, toy

from cdt_runtime.errors import CheckpointError
from cdt_train import compare as module
from cdt_train.compare import Arm, Bench, Result, arms_of, as_text, compare, run_arm
from cdt_train.encoders.backbones import Backbone
from cdt_train.engine import Engine
from cdt_train.finetune import Tuning, plan_splits


def bench(folder: Path, **changes: Any) -> Bench:
    data = toy()
    tuning = Tuning(epochs=2, batch_size=16, learning_rate=1e-2, ema_decay=0.0)
    parts: dict[str, Any] = {
        "data": data,
        "plan": plan_splits(data),
        "build": net,
        "tuning": tuning,
        "config": {"source": {"fingerprint": "toy"}},
        "folder": folder,
        "engine": Engine.start("cpu", "fp32"),
    }
    return Bench(**(parts | changes))


def test_every_set_of_weights_brings_its_permuted_control() -> None:
    weights = net().net.state_dict()
    arms = arms_of({"imagenet": weights, "ssl": weights})
    assert [(arm.name, arm.shuffled) for arm in arms] == [
        ("scratch", False),
        ("imagenet", False),
        ("imagenet permuted", True),
        ("ssl", False),
        ("ssl permuted", True),
    ]
    assert len({arm.identity for arm in arms}) == 3


def test_arms_start_from_their_weights() -> None:
    weights = net(5).net.state_dict()
    scratch, given, shuffled = (arm.start(net(), 1, False) for arm in arms_of({"x": weights}))

    def first(backbone: Backbone) -> torch.Tensor:
        return backbone.state_dict()["net.conv.weight"]

    assert torch.equal(first(scratch), first(net()))
    assert torch.equal(first(given), weights["conv.weight"])
    assert not torch.equal(first(shuffled), weights["conv.weight"])
    assert first(shuffled).sum() == pytest.approx(float(weights["conv.weight"].sum()), abs=1e-4)


def test_a_comparison_pairs_every_arm_with_scratch(tmp_path: Path) -> None:
    made = bench(tmp_path)
    found = compare(made, arms_of({"x": net(5).net.state_dict()}), ["linear", "full"], [0, 1])
    rows = {(row["arm"], row["mode"]): row for row in found["rows"]}
    assert len(rows) == 6
    for (arm, mode), row in rows.items():
        assert len(row["auc"]["seeds"]) == 2
        assert row["auc"]["value"] == pytest.approx(np.mean(row["auc"]["seeds"]))
        if arm == "scratch":
            assert row["difference"] is None
            continue
        gain = row["auc"]["value"] - rows["scratch", mode]["auc"]["value"]
        assert row["difference"]["auc"]["value"] == pytest.approx(gain)
    assert {path.name for path in (tmp_path / "arms").iterdir()} >= {
        "x_permuted-full-seed1.json",
        "scratch-linear-seed0.json",
    }
    assert not list((tmp_path / "running").iterdir())
    json.dumps(found, allow_nan=False)


def test_finished_runs_are_taken_up_and_others_settings_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arm = bench(tmp_path), Arm("scratch")
    first = run_arm(made, arm, "full", 0)
    monkeypatch.setattr(module, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    again = run_arm(made, arm, "full", 0)
    assert np.array_equal(first.chances, again.chances)
    assert "scratch-full-seed0: taken up from" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError,
        match=r"was made with source\.fingerprint='toy', now 'other': give another --output-dir",
    ):
        run_arm(bench(tmp_path, config={"source": {"fingerprint": "other"}}), arm, "full", 0)
    path = tmp_path / "arms" / "scratch-full-seed0.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"seed0\.json: not a finished run: remove it"):
        run_arm(made, arm, "full", 0)


def test_an_interrupted_arm_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_arm(bench(tmp_path / "whole"), Arm("scratch"), "full", 0)
    with monkeypatch.context() as patch:
        patch.setattr("cdt_train.finetune.predict", partial(_interrupt))
        with pytest.raises(KeyboardInterrupt):
            run_arm(bench(tmp_path / "parts"), Arm("scratch"), "full", 0)
    capsys.readouterr()
    found = run_arm(bench(tmp_path / "parts"), Arm("scratch"), "full", 0)
    assert np.array_equal(found.chances, expected.chances)
    assert "full: resuming after epoch 2" in capsys.readouterr().err


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_table_shows_means_intervals_and_the_rule_of_reading(tmp_path: Path) -> None:
    made = bench(tmp_path)
    truth = made.data.targets[made.plan.test]
    sure = np.eye(2)[truth] * 0.8 + 0.1
    results = {
        "scratch": [Result(1 - sure, 2.0), Result(sure, 4.0)],
        "x": [Result(sure, 5.0), Result(sure, 6.0)],
    }
    rows = [module._row(made, name, "full", results) for name in results]
    found = {"rows": rows, "seeds": [0, 1], "items": 32, "reported": "val", "note": "a note"}
    lines = as_text(found).splitlines()
    head = (
        "start",
        "mode",
        "AUC +- seeds [groups]",
        "accuracy +- seeds",
        "AUC - scratch",
        "seconds",
    )
    assert [name for name in head if name not in lines[0]] == []
    assert lines[1].split()[:5] == ["scratch", "full", "0.500", "+-", "6.353"]
    assert lines[1].split()[-1] == "3"
    assert "1.000 +- 0.000 [1.000, 1.000]" in lines[2]
    assert "+0.500 [+0.500, +0.500]" in lines[2]
    assert "32 images of val; a note" in lines[4]
    assert lines[-1] == (
        "a gain counts as transfer only where it exceeds that of the same weights permuted"
    )
