"""The steps of a phase: forward, backward and the optimiser, over micro-steps and processes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.averages import MicroBuffers, WeightAverage
from cdt_train.checkpoint import load_weights
from cdt_train.engine import Engine
from cdt_train.progress import bar, say
from cdt_train.rates import Rates, Schedule, build_optimizer
from cdt_train.seeding import step_seed

MAX_GRADIENT = 1.0
"""Largest norm of the gradient of each part of a model."""


class Phase(Protocol):
    """What a phase of training must provide."""

    name: str
    model: nn.Module

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the terms of one step; `loss` is what is minimised.

        Every random number hangs on the seed of the phase and on `index` alone.

        Args:
            index: of the micro-step since the start of the phase, over all processes, from 0.
            progress: share of the phase that is done, 0 to 1.
        """

    def validate(self) -> dict[str, float]:
        """Measure after an epoch; `score`, higher is better, chooses the best epoch.

        Each process measures; the mean counts.
        """


class _Step(nn.Module):
    """A step of a phase as a module, so that it can be wrapped.

    On a CPU a phase with 3D convolutions computes in float32 whatever the engine's precision: the
    gradients of their weights in bfloat16 are no numbers there (torch 2.13).
    """

    def __init__(self, phase: Phase, device: torch.device) -> None:
        super().__init__()
        self.model = phase.model
        self._phase = phase
        solid = any(isinstance(part, nn.Conv3d) for part in phase.model.modules())
        self._exact = solid and device.type == "cpu"

    def forward(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the terms; only `loss` keeps its graph."""
        with torch.autocast("cpu", enabled=False) if self._exact else nullcontext():
            terms = self._phase.step(index, progress)
        return {name: v if name == "loss" else v.detach() for name, v in terms.items()}


class Steps:
    """All of a phase that changes from step to step: weights, averages, rates, the scaler.

    Args:
        phase: what a step computes.
        schedule: how long and how fast.
        engine: what the phase trains on.
    """

    def __init__(self, phase: Phase, schedule: Schedule, engine: Engine) -> None:
        self._phase, self._schedule, self._engine = phase, schedule, engine
        self._optimizer = build_optimizer(phase.model, schedule)
        self._rates = Rates(self._optimizer, schedule)
        self._average: WeightAverage | None = None
        if schedule.ema_decay > 0:
            self._average = WeightAverage(phase.model, schedule.ema_decay)
        self._module = engine.prepare(_Step(phase, engine.device))
        self._buffers = MicroBuffers(phase.model, engine)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Take the steps of an epoch and return the means of their terms."""
        self._phase.model.train()
        found: list[dict[str, Tensor]] = []
        title = f"{self._phase.name} {epoch + 1}/{self._schedule.epochs}"
        for step in bar(range(self._schedule.steps), title):
            found += self._optimise(epoch, step)
        return self._means(found)

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights, as the mean over the processes."""
        with self._averaged():
            measured = {name: [value] for name, value in self._phase.validate().items()}
        mean = _mean_by_name(self._engine.gather(measured))
        self._rates.after_epoch(mean["score"])
        return mean

    def finish(self) -> None:
        """Leave the averaged weights in the model, if there are any."""
        if self._average is not None:
            self._average.put(self._phase.model)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; `model_state_dict` holds the averaged weights."""
        content = {
            "model_state_dict": self._phase.model.state_dict(),
            "optimizer_state_dict": self._optimizer.state_dict(),
            "scheduler_state_dict": self._rates.state_dict(),
            "scaler_state_dict": self._engine.scaler_state(),
            "micro_steps": self._engine.micro_steps,
        }
        if self._average is not None:
            content["live_state_dict"] = content["model_state_dict"]
            content["ema_updates"] = self._average.updates
            with self._averaged():
                averaged = self._phase.model.state_dict()
                content["model_state_dict"] = {k: v.clone() for k, v in averaged.items()}
        return content

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Take up what a checkpoint kept.

        Raises:
            CheckpointError: it does not fit the model or the schedule.
        """
        self._restore_weights(content, path)
        self._optimizer.load_state_dict(content["optimizer_state_dict"])
        self._rates.load_state_dict(content["scheduler_state_dict"])
        self._engine.restore_scaler(content["scaler_state_dict"])
        before, now = content["micro_steps"], self._engine.micro_steps
        if before != now:
            say(
                f"warning: {self._phase.name}: a step takes {now} micro-steps, before it took "
                f"{before}: the run won't end as the one it resumes"
            )

    def _restore_weights(self, content: dict[str, Any], path: Path) -> None:
        load_weights(self._phase.model, content["model_state_dict"], path)
        if self._average is None:
            return
        if "live_state_dict" not in content:
            raise CheckpointError(
                f"{path}: was trained without averaged weights: resume with "
                f"training.ema_decay=0, or give another --output-dir"
            )
        self._average.restore(self._phase.model, content["ema_updates"])
        load_weights(self._phase.model, content["live_state_dict"], path)

    def _averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights in place, if there are any."""
        if self._average is None:
            return nullcontext()
        return self._average.in_place(self._phase.model)

    def _optimise(self, epoch: int, step: int) -> list[dict[str, Tensor]]:
        """Take one step of the optimiser and return the terms of its micro-steps."""
        self._optimizer.zero_grad(set_to_none=True)
        done = epoch * self._schedule.steps + step
        found = []
        for micro in range(self._engine.accumulate):
            last = micro == self._engine.accumulate - 1
            self._buffers.before(micro)
            with self._engine.sharing(self._module, last):
                terms = self._micro_step(done, micro)
                found.append({name: value.detach() for name, value in terms.items()})
                if last:  # before processes wait for each other's gradients
                    self._require_finite([each["loss"] for each in found], epoch, step)
                self._engine.backward(terms["loss"])
            self._buffers.after()
        self._buffers.close()
        if self._engine.step(self._optimizer, self._clip):
            self._rates.after_step()
        if self._average is not None:
            self._average.update(self._phase.model)
        return found

    def _micro_step(self, done: int, micro: int) -> dict[str, Tensor]:
        index = self._engine.micro_index(done, micro)
        torch.manual_seed(step_seed(self._schedule.seed, index))
        progress = done / (self._schedule.epochs * self._schedule.steps)
        terms: dict[str, Tensor] = self._module(index, progress)
        return terms

    def _clip(self) -> None:
        for part in self._phase.model.children():  # else the steepest would stop the rest
            nn.utils.clip_grad_norm_(list(part.parameters()), MAX_GRADIENT)

    def _require_finite(self, losses: list[Tensor], epoch: int, step: int) -> None:
        """Stop all processes where one has a loss that is not finite."""
        bad = ~torch.isfinite(torch.stack([loss.float() for loss in losses]))
        if not self._engine.sum(bad.sum()):
            return
        values = [each for part in self._engine.gather(_plain(losses)) for each in part]
        value = next(value for value in values if not math.isfinite(value))
        raise TrainingError(
            f"{self._phase.name}: loss is {value} at epoch {epoch + 1}, step {step + 1}: lower "
            f"the learning rate; --resume goes on from the last checkpoint"
        )

    def _means(self, found: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means of the terms over the micro-steps of all processes that had them."""
        mine = {
            name: _plain([terms[name] for terms in found if name in terms])
            for name in dict.fromkeys(name for terms in found for name in terms)
        }
        return _mean_by_name(self._engine.gather(mine))


def _plain(values: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack([value.float() for value in values]).tolist()
    return numbers


def _mean_by_name(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [v for part in parts for v in part.get(name, [])] for name in names}
    return {name: math.fsum(each) / len(each) for name, each in values.items()}
