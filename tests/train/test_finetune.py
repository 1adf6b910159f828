from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import net, toy

from cdt_runtime.errors import CheckpointError, DatasetError, RecipeError
from cdt_train.encoders.backbones import Backbone
from cdt_train.engine import Engine
from cdt_train.finetune import Tuning, fine_tune, plan_splits
from cdt_train.supervised import (
    Augmentation,
    BatchOrder,
    Examples,
    SupervisedModel,
    SupervisedPhase,
    balancing_weights,
    chances_of,
    predict_logits,
)

CPU = torch.device("cpu")
QUICK = Tuning(epochs=4, batch_size=16, learning_rate=2e-2, ema_decay=0.0)


def tune(
    data: Any, tuning: Tuning, folder: Path, backbone: Backbone | None = None, **o: Any
) -> Any:
    return fine_tune(
        data,
        plan_splits(data),
        backbone or net(),
        tuning,
        folder=folder,
        config={"source": {"x": o.get("x", 1)}},
        resume=o.get("resume", False),
        engine=Engine.start("cpu", "fp32"),
    )


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 16, 16, 16)])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_every_task_is_learnt_in_2d_and_3d(task: Any, shape: Any, tmp_path: Path) -> None:
    data = toy(task, shape=shape)
    found = tune(data, replace(QUICK, epochs=10, augment=False), tmp_path)
    assert found.metrics["auc"]["value"] > 0.9
    assert found.metrics["auc"]["low"] <= found.metrics["auc"]["value"]
    assert found.chances.shape == (len(plan_splits(data).test), 2 if task != "multiclass" else 3)
    assert found.seconds > 0


def test_a_linear_probe_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    backbone, before = net(), net().state_dict()
    found = tune(toy(), Tuning("linear", 3, 16, 2e-2), tmp_path, backbone)
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # running statistics too
    assert len(found.history) == 3


def test_full_training_changes_the_backbone(tmp_path: Path) -> None:
    backbone, before = net(), net().state_dict()
    tune(toy(), QUICK, tmp_path, backbone)
    after = backbone.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if "net." in key)


def test_staged_training_freezes_first_then_learns_at_a_tenth_of_the_rate(tmp_path: Path) -> None:
    backbone, before = net(), net().state_dict()
    tuning = Tuning("frt", 5, 16, 2e-2, warmup=0.0, ema_decay=0.0)
    found = tune(toy(), tuning, tmp_path, backbone)
    stages = [
        torch.load(tmp_path / name, weights_only=True)
        for name in ("frt_stage1_epoch_0002.pt", "frt_stage2_epoch_0003.pt")
    ]
    first = stages[0]["model_state_dict"]
    assert all(torch.equal(first[f"backbone.{key}"], before[key]) for key in before)
    assert not torch.equal(backbone.state_dict()["net.conv.weight"], before["net.conv.weight"])
    assert any(key.startswith("adapter.1.") for key in first)
    rates = [
        stage["scheduler_state_dict"]["by_step"]["base_lrs"][0] for stage in stages
    ]  # of the optimiser
    assert rates == pytest.approx([2e-2, 2e-3])
    assert [entry["epoch"] for entry in found.history] == [1, 2, 1, 2, 3]


def test_without_a_test_split_val_is_reported_and_chooses_nothing(tmp_path: Path) -> None:
    data = toy()
    plan = plan_splits(data)
    assert (plan.reported, plan.val) == ("val", None)
    assert plan.note == (
        "no test split: the number of epochs is fixed, and val is reported, untouched"
    )
    tune(data, QUICK, tmp_path)
    assert not list(tmp_path.glob("*_best.pt"))


def test_with_a_test_split_val_chooses_the_epoch(tmp_path: Path) -> None:
    data = toy(splits=("train", "train", "val", "test"))
    plan = plan_splits(data)
    assert plan.note == "val chose the epoch; test was looked at once"
    assert plan.val is not None
    assert set(data.split[plan.val]) == {"val"}
    assert set(data.split[plan.test]) == {"test"}
    found = tune(data, QUICK, tmp_path)
    assert (tmp_path / "full_best.pt").is_file()
    assert {"val_auc", "val_accuracy", "val_loss"} <= set(found.history[0])


def test_training_stops_when_val_no_longer_improves(tmp_path: Path) -> None:
    data = toy(splits=("train", "train", "val", "test"))
    tuning = Tuning(epochs=30, batch_size=16, learning_rate=2e-2, patience=2, augment=False)
    found = tune(data, tuning, tmp_path)
    assert len(found.history) < 30
    assert found.history[-1]["stopped_early"] == 1


@pytest.mark.parametrize(
    ("change", "option"),
    [({"schedule": "plateau"}, "--schedule plateau"), ({"patience": 3}, "--p")],
)
def test_what_needs_val_is_refused_without_it(change: Any, option: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=rf"^{option}.*: needs a val split beside the one reporte"
    ):
        tune(toy(), Tuning(**change), tmp_path)


def test_a_share_of_train_is_held_out_by_group() -> None:
    data = toy(splits=("train", "val", "test"))
    plan = plan_splits(data, dev_share=0.25, seed=3)
    assert set(data.split[plan.train]) == set(data.split[plan.test]) == {"train"}
    assert not set(data.groups[plan.train]) & set(data.groups[plan.test])
    assert 0.2 < len(plan.test) / (len(plan.train) + len(plan.test)) < 0.3
    assert plan.reported == "dev"
    assert plan.note == "25% of train held out and reported; val and test stay untouched"


def test_splits_that_report_nothing_are_refused() -> None:
    with pytest.raises(
        DatasetError, match=r"neither a val nor a test split: --dev-share 0\.2 makes"
    ):
        plan_splits(toy(splits=("train",)))
    with pytest.raises(DatasetError, match=r"--test-fold takes one of 1, 2, 10 makes one"):
        plan_splits(toy(splits=("1", "10", "2")))
    few = toy(splits=("train", *("val",) * 15))
    with pytest.raises(
        DatasetError, match=r"--dev-share 0\.9: train has 2 groups: too few to part"
    ):
        plan_splits(few, dev_share=0.9)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    data, whole = toy(), tmp_path / "whole"
    expected = tune(data, QUICK, whole)
    parts = tmp_path / "parts"
    parts.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        steps = SupervisedPhase.step

        def stop(self: SupervisedPhase, index: int, progress: float) -> Any:
            if progress >= 0.5:
                raise KeyboardInterrupt
            return steps(self, index, progress)

        patch.setattr(SupervisedPhase, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(data, QUICK, parts)
    found = tune(data, QUICK, parts, resume=True)
    assert found.history == expected.history
    assert np.array_equal(found.chances, expected.chances)
    with pytest.raises(CheckpointError, match=r"was trained with source\.x=1, now 2: resume with"):
        tune(data, QUICK, parts, resume=True, x=2)


def test_every_epoch_meets_each_item_once_in_another_order() -> None:
    order = BatchOrder(20, 5, seed=1)
    epochs = [[i for step in range(4) for i in order(4 * e + step).tolist()] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert BatchOrder(20, 5, seed=2)(0).tolist() != order(0).tolist()
    assert BatchOrder(3, 5, seed=1).steps == 1


def test_class_weights_let_classes_count_alike() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    weights = balancing_weights(targets, "binary", 2)
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])
    assert weights[targets].mean() == pytest.approx(1.0)
    labels = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0]])
    assert balancing_weights(labels, "multilabel", 2).tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize(
    ("task", "weights", "expected"),
    [
        ("binary", None, 0.5 * (0.3132617 + 1.3132617)),
        ("binary", [1.0, 3.0], 0.5 * (3 * 0.3132617 + 1.3132617)),
    ],
)
def test_the_loss_of_a_binary_task(task: Any, weights: Any, expected: float) -> None:
    examples = Examples(torch.zeros(2, 1, 16, 16), torch.tensor([1, 0]))
    made = SupervisedPhase(
        "toy",
        SupervisedModel(net(), 1, None, frozen=False),
        examples,
        None,
        task=task,
        order=BatchOrder(2, 2, 0),
        augmentation=Augmentation(off=True),
        class_weights=None if weights is None else torch.tensor(weights),
        label_smoothing=0.0,
        seed=0,
        device=CPU,
    )
    logits = torch.tensor([[1.0], [1.0]])
    assert made._loss(logits, examples.targets).item() == pytest.approx(expected)


def test_chances_sum_to_one_or_stand_alone() -> None:
    logits = torch.tensor([[0.0], [2.0]])
    assert chances_of(logits, "binary").sum(axis=1).tolist() == [1, 1]
    assert chances_of(logits, "binary")[1, 1] == pytest.approx(0.8808, abs=1e-4)
    wide = torch.randn(3, 4)
    assert chances_of(wide, "multiclass").sum(axis=1) == pytest.approx([1, 1, 1])
    assert chances_of(wide, "multilabel").shape == (3, 4)


def test_a_probe_takes_tokens_of_any_scale_and_a_learning_backbone_keeps_its_own() -> None:
    images = torch.rand(8, 1, 16, 16)
    for frozen in (True, False):
        answers = []
        for scale in (1e3, 1e6):
            backbone = net()
            model = SupervisedModel(backbone, 1, None, frozen=frozen)
            torch.manual_seed(1)
            nn.init.normal_(model.head.weight)
            inner = backbone.net.norm
            inner.weight.data *= scale
            inner.bias.data *= scale
            answers.append(model.train()(images))
        assert torch.allclose(answers[0], answers[1], atol=0.1) is frozen


def test_mirrored_images_get_one_answer_with_tta_alone() -> None:
    model = SupervisedModel(net(), 1, None, frozen=False)
    nn.init.normal_(model.head.weight)
    images = torch.rand(3, 1, 16, 16)
    plain, turned = (
        predict_logits(model, each, CPU, tta=False) for each in (images, images.flip(3))
    )
    assert not torch.allclose(plain, turned)
    both = [predict_logits(model, each, CPU, tta=True) for each in (images, images.flip(3))]
    torch.testing.assert_close(*both)
