"""Supervised fine-tuning of a backbone: linear probe, everything, or staged.

    linear   the backbone is frozen, a linear layer learns
    full     everything learns
    frt      half of the epochs: frozen backbone, transfer module and linear layer learn;
             then everything learns from there, at a tenth of the rate

Which figures are honest depends on the splits. With a test split, val chooses the epoch and test is
reported. Without one the number of epochs is fixed and val is reported, untouched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError, RecipeError
from cdt_train.augment3d import is_mask
from cdt_train.checkpoint import load_checkpoint, load_weights
from cdt_train.encoders.backbones import Backbone, ImageShape, count_tokens
from cdt_train.engine import Engine
from cdt_train.loop import Run, Schedule, train_phase
from cdt_train.models.adapter import transfer_module
from cdt_train.supervised import (
    Augmentation,
    BatchOrder,
    Examples,
    SupervisedModel,
    SupervisedPhase,
    balancing_weights,
    chances_of,
    output_count,
    predict_logits,
)
from cdt_train.supervised_metrics import Task, supervised_metrics, with_intervals

Mode = Literal["linear", "full", "frt"]
MODES: tuple[Mode, ...] = ("linear", "full", "frt")
STAGE2_RATE = 0.1
STAGE2_WARMUP = 2
"""Epochs of stage 2 in which the rate rises."""


class Labelled(Protocol):
    """What is used of a labelled data set (`cdt_train.data.labelled.LabelledArrays`)."""

    @property
    def images(self) -> NDArray[Any]:
        """`(n, C, H, W)` or `(n, C, D, H, W)`, uint8 or float."""

    @property
    def targets(self) -> NDArray[Any]:
        """`(n,)` int64, or `(n, L)` float32."""

    @property
    def task(self) -> Task:
        """What kind of targets."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the targets."""

    @property
    def groups(self) -> NDArray[Any]:
        """`(n,)`, what must stay together."""

    @property
    def split(self) -> NDArray[Any]:
        """`(n,)`, train, val or test."""

    @property
    def fingerprint(self) -> str:
        """Of the contents."""


@dataclass(frozen=True)
class Tuning:
    """The numbers of a supervised training.

    Attributes:
        mode: see the module's docstring.
        epochs: of all stages together.
        batch_size: images a step.
        learning_rate: top of the schedule.
        weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises, but for stage 2 of `frt`.
        schedule: cosine, or plateau: a lower rate whenever val no longer improves.
        patience: epochs without a better val after which training stops; 0: never.
        ema_decay: of the average of the weights that is evaluated; 0: none.
        label_smoothing: of a multi-class loss.
        class_weights: let every class count alike.
        augment: change training images at random.
        tta: average over mirrored test images.
        maps: of the transfer module.
        rank: of each map.
        seed: of every random number.
    """

    mode: Mode = "full"
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    schedule: Literal["cosine", "plateau"] = "cosine"
    patience: int = 0
    ema_decay: float = 0.99
    label_smoothing: float = 0.0
    class_weights: bool = False
    augment: bool = True
    tta: bool = False
    maps: int = 16
    rank: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Who learns, who chooses the epoch, who is reported.

    Attributes:
        train: indices of the items to learn from.
        val: of those that choose the epoch, or None.
        test: of those that are reported.
        reported: name of that split.
        note: one line on what the figures mean.
    """

    train: NDArray[np.int64]
    val: NDArray[np.int64] | None
    test: NDArray[np.int64]
    reported: str
    note: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a training gave.

    Attributes:
        metrics: each figure with `value`, `low` and `high`.
        chances: `(n, K)` of the reported split.
        history: one entry an epoch, all stages.
        seconds: of training and evaluation.
        model: trained.
    """

    metrics: dict[str, dict[str, float | None]]
    chances: NDArray[np.float64]
    history: list[dict[str, float]]
    seconds: float
    model: SupervisedModel


def plan_splits(data: Labelled, *, dev_share: float = 0.0, seed: int = 0) -> Plan:
    """Decide what each split is for.

    Args:
        data: labelled.
        dev_share: above 0, hold out that share of train's groups and report it: for the choice of
            settings, with val and test untouched.
        seed: of that share.

    Raises:
        DatasetError: nothing to learn from, or nothing to report.
    """
    train, val, test = (np.flatnonzero(data.split == name) for name in ("train", "val", "test"))
    if dev_share > 0 and len(train):
        held = _held_out(data.groups[train], dev_share, seed)
        note = f"{dev_share:.0%} of train held out and reported; val and test stay untouched"
        return Plan(train[~held], None, train[held], "dev", note)
    if len(test) > 0:
        note = "val chose the epoch; test was looked at once" if len(val) else "fixed epochs"
        return Plan(train, val if len(val) else None, test, "test", note)
    if len(val) == 0 or len(train) < 2:
        folds = sorted({str(name) for name in data.split if str(name).isdigit()}, key=int)
        cure = f"--test-fold takes one of {', '.join(folds)}" if folds else "--dev-share 0.2"
        raise DatasetError(f"the data have neither a val nor a test split: {cure} makes one")
    note = "no test split: the number of epochs is fixed, and val is reported, untouched"
    return Plan(train, None, val, "val", note)


def _held_out(groups: NDArray[Any], share: float, seed: int) -> NDArray[np.bool_]:
    names = np.unique(groups)
    count = max(1, round(share * len(names)))
    if count >= len(names):
        raise DatasetError(f"--dev-share {share}: train has {len(names)} groups: too few to part")
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    held: NDArray[np.bool_] = np.isin(groups, names[chosen])
    return held


def fine_tune(
    data: Labelled,
    plan: Plan,
    backbone: Backbone,
    tuning: Tuning,
    *,
    folder: Path,
    config: Mapping[str, Any],
    resume: bool,
    engine: Engine,
) -> Outcome:
    """Train a classifier on top of a backbone, and evaluate it.

    Args:
        data: labelled images.
        plan: of the splits.
        backbone: trained in place, unless `tuning.mode` is linear.
        tuning: all numbers.
        folder: of the checkpoints.
        config: compared on resume, beside `tuning`.
        resume: go on from the newest checkpoint.
        engine: to train on.

    Raises:
        RecipeError: the schedule needs a validation split and there is none.
        TrainingError: a loss is not finite.
        CheckpointError: a checkpoint can't be written, or does not fit.
    """
    start = time.monotonic()
    if plan.val is None and (tuning.schedule == "plateau" or tuning.patience):
        asked = "--schedule plateau" if tuning.schedule == "plateau" else "--patience"
        raise RecipeError(f"{asked}: needs a val split beside the one reported: leave it out")
    torch.manual_seed(tuning.seed)
    model = _model(data, backbone, tuning)
    parts = _Parts(data, plan, tuning, engine.device)
    history: list[dict[str, float]] = []
    for stage in _stages(tuning):
        model.freeze(stage.frozen)
        run = Run(
            folder,
            stage.prefix,
            {"tuning": asdict(tuning), **config},
            keep=1,
            resume=resume,
            best_path=folder / f"{stage.prefix}_best.pt" if plan.val is not None else None,
        )
        history += train_phase(
            parts.phase(stage, model), _schedule(stage, tuning, parts), run, engine
        )
        if run.best_path is not None:
            best = load_checkpoint(run.best_path, ("model_state_dict",))
            load_weights(model, best["model_state_dict"], run.best_path)
    chances = predict(model, data, plan.test, tuning.tta, engine.device)
    metrics = report(chances, data, plan.test)
    return Outcome(metrics, chances, history, time.monotonic() - start, model)


def predict(
    model: SupervisedModel,
    data: Labelled,
    chosen: NDArray[np.int64],
    tta: bool,
    device: torch.device,
) -> NDArray[np.float64]:
    """Class probabilities `(n, K)` of the chosen images."""
    images = torch.from_numpy(data.images[chosen])
    return chances_of(predict_logits(model, images, device, tta=tta), data.task)


def report(
    chances: NDArray[np.float64], data: Labelled, chosen: NDArray[np.int64]
) -> dict[str, dict[str, float | None]]:
    """Every metric of the chosen images, with its interval over groups."""
    truth = data.targets[chosen]
    return with_intervals(
        lambda some: supervised_metrics(chances[some], truth[some], data.task), data.groups[chosen]
    )


def image_shape(data: Labelled) -> ImageShape:
    """What a backbone for these data takes in."""
    return ImageShape(data.images.shape[1], tuple(data.images.shape[2:]))


def _model(data: Labelled, backbone: Backbone, tuning: Tuning) -> SupervisedModel:
    adapter = None
    count = count_tokens(backbone, image_shape(data))
    if tuning.mode == "frt":
        adapter = transfer_module(count, backbone.width, maps=tuning.maps, rank=tuning.rank)
    outputs = output_count(data.task, len(data.classes))
    return SupervisedModel(backbone, outputs, adapter, frozen=tuning.mode != "full")


@dataclass(frozen=True)
class _Stage:
    prefix: str
    epochs: int
    rate: float
    frozen: bool
    warmup_epochs: int | None = None


def _stages(tuning: Tuning) -> list[_Stage]:
    if tuning.mode != "frt":
        return [_Stage(tuning.mode, tuning.epochs, 1.0, tuning.mode == "linear")]
    first = max(1, tuning.epochs // 2)
    second = max(1, tuning.epochs - first)
    return [
        _Stage("frt_stage1", first, 1.0, frozen=True),
        _Stage("frt_stage2", second, STAGE2_RATE, frozen=False, warmup_epochs=STAGE2_WARMUP),
    ]


def _schedule(stage: _Stage, tuning: Tuning, parts: _Parts) -> Schedule:
    warmup = tuning.warmup
    if stage.warmup_epochs is not None:
        warmup = min(0.5, stage.warmup_epochs / stage.epochs)
    return Schedule(
        epochs=stage.epochs,
        steps=parts.order.steps,
        learning_rate=tuning.learning_rate * stage.rate,
        weight_decay=tuning.weight_decay,
        warmup=warmup,
        schedule=tuning.schedule,
        patience=tuning.patience or None,
        ema_decay=tuning.ema_decay,
        seed=tuning.seed,
    )


class _Parts:
    """What all stages of one training share."""

    def __init__(self, data: Labelled, plan: Plan, tuning: Tuning, device: torch.device) -> None:
        self._train = _examples(data, plan.train)
        self._val = None if plan.val is None else _examples(data, plan.val)
        self._task, self._tuning, self._device = data.task, tuning, device
        self.order = BatchOrder(len(self._train), tuning.batch_size, tuning.seed)
        mask = data.images.ndim == 5 and is_mask(self._train.images[:256])
        self._augmentation = Augmentation(mask=mask, off=not tuning.augment)
        self._weights = None
        if tuning.class_weights:
            classes = len(data.classes)
            self._weights = balancing_weights(self._train.targets, data.task, classes)

    def phase(self, stage: _Stage, model: SupervisedModel) -> SupervisedPhase:
        return SupervisedPhase(
            stage.prefix.replace("_", " "),
            model,
            self._train,
            self._val,
            task=self._task,
            order=self.order,
            augmentation=self._augmentation,
            class_weights=self._weights,
            label_smoothing=self._tuning.label_smoothing,
            seed=self._tuning.seed,
            device=self._device,
        )


def _examples(data: Labelled, chosen: NDArray[np.int64]) -> Examples:
    images, targets = data.images[chosen], data.targets[chosen]
    return Examples(torch.from_numpy(images), torch.from_numpy(targets))
