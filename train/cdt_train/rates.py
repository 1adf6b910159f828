"""Learning rates: which weights learn, how fast, and how that changes over a phase."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cdt_runtime.errors import TrainingError

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.3, 2
"""What the rate is multiplied by after more than so many epochs without a better score."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a phase trains.

    Attributes:
        epochs: number of epochs, at most.
        steps: steps of the optimiser an epoch.
        learning_rate: top of the schedule.
        weight_decay: of AdamW, on weights of two or more axes.
        warmup: share of all steps in which the rate rises linearly.
        schedule: then it falls as a cosine, or whenever the score stands still.
        patience: epochs without a better score before the phase stops early; None: never.
        ema_decay: of the moving average of the weights that is validated and kept; 0: none.
        groups: factor of the learning rate for a parameter's name; 0 freezes the parameter. It
            decides for every parameter, also for those frozen before. None: 1 for all.
        seed: of the random numbers that layers such as dropout draw.
    """

    epochs: int
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: Literal["cosine", "plateau"] = "cosine"
    patience: int | None = None
    ema_decay: float = 0.0
    groups: Callable[[str], float] | None = None
    seed: int = 0


class Rates:
    """The learning rate of each step.

    Args:
        optimizer: its groups are changed.
        schedule: of the phase.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        total = schedule.epochs * schedule.steps
        self._rising = max(1, round(schedule.warmup * total))
        falls = schedule.schedule == "cosine"
        self._by_step = LambdaLR(optimizer, _cosine(self._rising, total) if falls else self._rise)
        self._by_score = None if falls else _plateau(optimizer)

    def after_step(self) -> None:
        """Move on by one step of the optimiser."""
        if self._by_score is None or not self._risen():
            self._by_step.step()

    def after_epoch(self, score: float) -> None:
        """Take in the validation score, higher being better."""
        if self._by_score is not None and self._risen():
            self._by_score.step(score)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        by_score = self._by_score.state_dict() if self._by_score else None
        return {"by_step": self._by_step.state_dict(), "by_score": by_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self._by_step.load_state_dict(state["by_step"])
        if self._by_score is not None:
            self._by_score.load_state_dict(state["by_score"])

    def _risen(self) -> bool:
        return self._by_step.last_epoch + 1 >= self._rising

    def _rise(self, step: int) -> float:
        return min(1.0, (step + 1) / self._rising)


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Build AdamW over the weights that learn; those to be frozen are frozen.

    Raises:
        TrainingError: every weight is frozen.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        factor = 1.0 if schedule.groups is None else schedule.groups(name)
        if schedule.groups is not None:
            weight.requires_grad_(factor > 0)
        if weight.requires_grad:
            decay = schedule.weight_decay if weight.ndim > 1 else 0.0
            found.setdefault((factor, decay), []).append(weight)
    if not found:
        raise TrainingError("every weight of the model is frozen: nothing is left to train")
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": schedule.learning_rate * factor, "weight_decay": decay}
            for (factor, decay), weights in found.items()
        ]
    )


def _plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=PLATEAU_FACTOR,
        patience=PLATEAU_PATIENCE,
        threshold=0.0,
        threshold_mode="abs",
    )


def _cosine(rising: int, total: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))

    return factor
