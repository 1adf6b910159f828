"""The one training loop: epochs of steps, checkpoints, exact resume.

Random numbers of a step hang on the seed and the step's index alone, so on a CPU a run that resumes
after epoch n goes on exactly as one that was never stopped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint, sweep_partial
from cdt_train.progress import bar, say

MAX_GRADIENT = 1.0
"""Largest norm of the gradient of each part of a model."""

STATE = ("epoch", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "config")


class Phase(Protocol):
    """What a phase of training must provide."""

    name: str
    model: nn.Module

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the terms of one step; `loss` is what is minimised.

        Every random number hangs on the seed of the phase and on `index` alone.

        Args:
            index: of the step since the start of the phase, from 0.
            progress: share of the phase that is done, 0 to 1.
        """

    def validate(self) -> dict[str, float]:
        """Measure after an epoch; `score`, higher is better, chooses the best epoch."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a phase trains.

    Attributes:
        epochs: number of epochs.
        steps: steps an epoch.
        learning_rate: top of the schedule.
        weight_decay: of AdamW, on weights of two or more axes.
        warmup: share of all steps in which the rate rises linearly; then it falls as a cosine.
    """

    epochs: int
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float


@dataclass
class Run:
    """Where a phase writes and what it adds to its checkpoints.

    Attributes:
        folder: of the checkpoints.
        prefix: of their names: `PREFIX_epoch_0001.pt`.
        config: the recipe, compared on resume.
        extra: further entries of each checkpoint.
        keep: how many checkpoints stay.
        resume: go on from the newest checkpoint.
        best_path: where the best epoch is kept, or None.
    """

    folder: Path
    prefix: str
    config: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 3
    resume: bool = False
    best_path: Path | None = None


def train_phase(phase: Phase, schedule: Schedule, run: Run) -> list[dict[str, float]]:
    """Train a phase to its end.

    Returns:
        One entry an epoch: the means of the step terms and what `validate` measured.

    Raises:
        TrainingError: a loss is not finite.
        CheckpointError: a checkpoint can't be written, or one to resume from does not fit.
    """
    optimizer = torch.optim.AdamW(
        _decay_groups(phase.model, schedule.weight_decay), lr=schedule.learning_rate
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(schedule))
    sweep_partial(run.folder)
    history: list[dict[str, float]] = []
    newest = newest_checkpoint(run) if run.resume else None
    if newest is not None:
        history = _restore(newest, phase, optimizer, scheduler, run)
        say(f"{phase.name}: resuming after epoch {len(history)}")
    for epoch in range(len(history), schedule.epochs):
        terms = _train_epoch(phase, epoch, schedule, optimizer, scheduler)
        entry = {"epoch": epoch + 1, **terms, **phase.validate()}
        history.append(entry)
        improved = all(_merit(entry) > _merit(earlier) for earlier in history[:-1])
        best = max(past["score"] for past in history)
        content = {
            "epoch": epoch + 1,
            "model_state_dict": phase.model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "best_metric": best,
            "config": dict(run.config),
            "history": history,
            **run.extra,
        }
        if improved and run.best_path is not None:
            save_checkpoint(run.best_path, content)
        save_checkpoint(run.folder / f"{run.prefix}_epoch_{epoch + 1:04d}.pt", content)
        for stale in _checkpoints(run)[: -run.keep]:
            stale.unlink()
    return history


def _merit(entry: Mapping[str, float]) -> tuple[float, float]:
    """What the best epoch has most of: the score, then the lower validation loss."""
    return entry["score"], -entry.get("val_loss", 0.0)


def newest_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint of the highest epoch, or None."""
    found = _checkpoints(run)
    return found[-1] if found else None


def _checkpoints(run: Run) -> list[Path]:
    pattern = re.compile(rf"{re.escape(run.prefix)}_epoch_(\d+)\.pt")
    found = [path for path in run.folder.glob("*.pt") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(pattern.fullmatch(path.name)[1]))  # type: ignore[index]


def _train_epoch(
    phase: Phase,
    epoch: int,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, float]:
    phase.model.train()
    found: dict[str, list[float]] = {}
    title = f"{phase.name} {epoch + 1}/{schedule.epochs}"
    for step in bar(range(schedule.steps), title):
        index = epoch * schedule.steps + step
        terms = phase.step(index, index / (schedule.epochs * schedule.steps))
        loss = terms["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"{phase.name}: loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}: lower "
                f"the learning rate; --resume goes on from the last checkpoint"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for part in phase.model.children():  # each on its own, or the steepest would stop the rest
            nn.utils.clip_grad_norm_(list(part.parameters()), MAX_GRADIENT)
        optimizer.step()
        scheduler.step()
        for name, value in terms.items():
            found.setdefault(name, []).append(value.item())
    return {name: sum(values) / len(values) for name, values in found.items()}


def _restore(
    path: Path,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    run: Run,
) -> list[dict[str, float]]:
    content = load_checkpoint(path, (*STATE, "history"))
    require_same_recipe(path, content["config"], run.config)
    load_weights(phase.model, content["model_state_dict"], path)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    scheduler.load_state_dict(content["scheduler_state_dict"])
    return list(content["history"])


def require_same_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume with another recipe.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    for section, values in wanted.items():
        before = found.get(section, {})
        for key, value in values.items():
            if before.get(key) != value:
                raise CheckpointError(
                    f"{path}: was trained with {section}.{key}={before.get(key)!r}, now {value!r}: "
                    f"resume with the same recipe, or give another --output-dir"
                )


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _cosine(schedule: Schedule) -> Callable[[int], float]:
    total = schedule.epochs * schedule.steps
    rising = max(1, round(schedule.warmup * total))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))

    return factor
