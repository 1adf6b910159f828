"""The one training loop: epochs of steps, on one process or several, checkpoints, exact resume.

Random numbers of a step hang on the seed and the step's index alone. So on a CPU a run that resumes
after epoch n goes on exactly as one that was never stopped, and two processes do the work of one
process with twice the micro-steps.
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.averages import MicroBuffers, WeightAverage
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint, sweep_partial
from cdt_train.engine import Engine
from cdt_train.progress import bar, say
from cdt_train.rates import Rates, Schedule, build_optimizer
from cdt_train.scalars import Scalars, scalars
from cdt_train.seeding import step_seed

__all__ = [
    "Phase",
    "Run",
    "Schedule",
    "newest_checkpoint",
    "require_same_recipe",
    "train_phase",
]

MAX_GRADIENT = 1.0
"""Largest norm of the gradient of each part of a model."""

STATE = (
    "epoch",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "scaler_state_dict",
    "micro_steps",
    "config",
    "history",
)


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


def train_phase(
    phase: Phase, schedule: Schedule, run: Run, engine: Engine | None = None
) -> list[dict[str, float]]:
    """Train a phase to its end; its model then holds the averaged weights, if there are any.

    Args:
        phase: what a step computes.
        schedule: how long and how fast.
        run: where checkpoints go.
        engine: what the phase trains on; None: this process alone, in fp32, where the model lives.

    Returns:
        One entry an epoch: the means of the step terms and what `validate` measured; the last one
        has `stopped_early` where the patience was at its end.

    Raises:
        TrainingError: a loss is not finite, or nothing is left to train.
        CheckpointError: a checkpoint can't be written, or one to resume from does not fit.
        KeyboardInterrupt: by Ctrl-C or SIGTERM.
    """
    if engine is None:
        place = next(phase.model.parameters()).device.type
        engine = Engine.start(device="cuda" if place == "cuda" else "cpu", precision="fp32")
    trainer = _Trainer(phase, schedule, run, engine)
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with _interruptible(), torch.random.fork_rng(devices=devices):
            trainer.train()
    except KeyboardInterrupt:
        say(f"interrupted after epoch {trainer.saved} of {phase.name}: --resume goes on from there")
        raise
    finally:
        engine.release()
    return trainer.history


class _Step(nn.Module):
    """A step of a phase as a module, so that it can be wrapped."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.model = phase.model
        self._phase = phase

    def forward(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the terms; only `loss` keeps its graph."""
        terms = self._phase.step(index, progress)
        return {name: v if name == "loss" else v.detach() for name, v in terms.items()}


class _Trainer:
    """A phase in training: all that changes from step to step.

    Attributes:
        history: of the epochs that are done.
        saved: the epoch of the last checkpoint.
    """

    def __init__(self, phase: Phase, schedule: Schedule, run: Run, engine: Engine) -> None:
        self._phase, self._schedule, self._run, self._engine = phase, schedule, run, engine
        self._optimizer = build_optimizer(phase.model, schedule)
        self._rates = Rates(self._optimizer, schedule)
        self._average: WeightAverage | None = None
        if schedule.ema_decay > 0:
            self._average = WeightAverage(phase.model, schedule.ema_decay)
        self._step = engine.prepare(_Step(phase))
        self._buffers = MicroBuffers(phase.model, engine)
        self.history: list[dict[str, float]] = []
        self.saved = 0

    def train(self) -> None:
        """Train to the end of the phase."""
        if self._engine.is_main:
            sweep_partial(self._run.folder)
        newest = newest_checkpoint(self._run) if self._run.resume else None
        if newest is not None:
            self._restore(newest)
            say(f"{self._phase.name}: resuming after epoch {self.saved}")
        with scalars(self._log_dir(), self._phase.name, self.saved) as log:
            while not self._finished():
                self._epoch(log)
        if self._average is not None:
            self._average.put(self._phase.model)
        self._engine.wait()

    def _log_dir(self) -> Path | None:
        """Where the main process logs: phases of several folds must not meet in one folder."""
        if self._engine.log_dir is None or not self._engine.is_main:
            return None
        return self._engine.log_dir / self._run.folder.name

    def _finished(self) -> bool:
        if not self.history:
            return self._schedule.epochs == 0
        return len(self.history) >= self._schedule.epochs or "stopped_early" in self.history[-1]

    def _epoch(self, log: Scalars) -> None:
        started, epoch = time.monotonic(), len(self.history)
        terms = self._run_steps(epoch)
        with self._averaged():
            entry = {"epoch": epoch + 1, **terms, **self._validate()}
        self._rates.after_epoch(entry["score"])
        self.history.append(entry)
        if self._out_of_patience():
            entry["stopped_early"] = 1.0
        if self._engine.is_main:
            self._save()
        self.saved = epoch + 1
        log.write(entry)
        self._tell(entry, time.monotonic() - started)

    def _averaged(self) -> Any:
        """Put the averaged weights in place, if there are any."""
        if self._average is None:
            return nullcontext()
        return self._average.in_place(self._phase.model)

    def _run_steps(self, epoch: int) -> dict[str, float]:
        self._phase.model.train()
        found: list[dict[str, Tensor]] = []
        title = f"{self._phase.name} {epoch + 1}/{self._schedule.epochs}"
        for step in bar(range(self._schedule.steps), title):
            found += self._optimise(epoch, step)
        return self._means(found)

    def _optimise(self, epoch: int, step: int) -> list[dict[str, Tensor]]:
        """Take one step of the optimiser and return the terms of its micro-steps."""
        self._optimizer.zero_grad(set_to_none=True)
        done = epoch * self._schedule.steps + step
        found = []
        for micro in range(self._engine.accumulate):
            last = micro == self._engine.accumulate - 1
            self._buffers.before(micro)
            with self._engine.sharing(self._step, last):
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
        terms: dict[str, Tensor] = self._step(index, progress)
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

    def _validate(self) -> dict[str, float]:
        measured = {name: [value] for name, value in self._phase.validate().items()}
        return _mean_by_name(self._engine.gather(measured))

    def _out_of_patience(self) -> bool:
        scores = [entry["score"] for entry in self.history]
        waited = len(scores) - 1 - scores.index(max(scores))
        return self._schedule.patience is not None and waited >= self._schedule.patience

    def _tell(self, entry: Mapping[str, float], seconds: float) -> None:
        epochs = str(self._schedule.epochs)
        number = str(int(entry["epoch"])).rjust(len(epochs))
        say(
            f"{self._phase.name} {number}/{epochs}: loss {entry['loss']:.3f}, "
            f"score {entry['score']:.3f}, {seconds:.0f} s"
        )
        if "stopped_early" in entry:
            say(
                f"{self._phase.name}: stopped early, no better score in "
                f"{self._schedule.patience} epochs"
            )

    def _save(self) -> None:
        content = self._content()
        earlier, entry = self.history[:-1], self.history[-1]
        improved = all(_merit(entry) > _merit(past) for past in earlier)
        if improved and self._run.best_path is not None:
            save_checkpoint(self._run.best_path, content)
        name = f"{self._run.prefix}_epoch_{len(self.history):04d}.pt"
        save_checkpoint(self._run.folder / name, content)
        for stale in _checkpoints(self._run)[: -self._run.keep]:
            stale.unlink()

    def _content(self) -> dict[str, Any]:
        content = {
            "epoch": len(self.history),
            "model_state_dict": self._phase.model.state_dict(),
            "optimizer_state_dict": self._optimizer.state_dict(),
            "scheduler_state_dict": self._rates.state_dict(),
            "scaler_state_dict": self._engine.scaler_state(),
            "best_metric": max(entry["score"] for entry in self.history),
            "micro_steps": self._engine.micro_steps,
            "config": dict(self._run.config),
            "history": self.history,
            **self._run.extra,
        }
        if self._average is not None:
            content["live_state_dict"] = content["model_state_dict"]
            content["ema_updates"] = self._average.updates
            with self._averaged():
                averaged = self._phase.model.state_dict()
                content["model_state_dict"] = {k: v.clone() for k, v in averaged.items()}
        return content

    def _restore(self, path: Path) -> None:
        content = load_checkpoint(path, STATE)
        require_same_recipe(path, content["config"], self._run.config)
        load_weights(self._phase.model, content["model_state_dict"], path)
        if self._average is not None:
            if "live_state_dict" not in content:
                raise CheckpointError(
                    f"{path}: was trained without averaged weights: resume with "
                    f"training.ema_decay=0, or give another --output-dir"
                )
            self._average.restore(self._phase.model, content["ema_updates"])
            load_weights(self._phase.model, content["live_state_dict"], path)
        self._optimizer.load_state_dict(content["optimizer_state_dict"])
        self._rates.load_state_dict(content["scheduler_state_dict"])
        self._engine.restore_scaler(content["scaler_state_dict"])
        self._warn_of_other_batch(content["micro_steps"])
        self.history = list(content["history"])
        self.saved = len(self.history)

    def _warn_of_other_batch(self, before: int) -> None:
        if before != self._engine.micro_steps:
            say(
                f"warning: {self._phase.name}: a step takes {self._engine.micro_steps} "
                f"micro-steps, before it took {before}: the run won't end as the one it resumes"
            )


def _plain(values: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack([value.float() for value in values]).tolist()
    return numbers


def _mean_by_name(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [v for part in parts for v in part.get(name, [])] for name in names}
    return {name: math.fsum(each) / len(each) for name, each in values.items()}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
