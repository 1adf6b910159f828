"""The one training loop: epochs of steps, on one process or several, checkpoints, exact resume.

Random numbers of a step hang on the seed and the step's index alone. So on a CPU a run that resumes
after epoch n goes on exactly as one that was never stopped, and two processes do the work of one
process with twice the micro-steps.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from cdt_train.checkpoint import load_checkpoint, save_checkpoint, sweep_partial
from cdt_train.engine import Engine
from cdt_train.progress import say
from cdt_train.rates import Schedule
from cdt_train.resume import STATE, Run, checkpoints, merit, newest_checkpoint, require_same_recipe
from cdt_train.scalars import Scalars, scalars
from cdt_train.steps import Phase, Steps

__all__ = [
    "Phase",
    "Run",
    "Schedule",
    "newest_checkpoint",
    "require_same_recipe",
    "train_phase",
]


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


class _Trainer:
    """A phase in training, epoch by epoch.

    Attributes:
        history: of the epochs that are done.
        saved: the epoch of the last checkpoint.
    """

    def __init__(self, phase: Phase, schedule: Schedule, run: Run, engine: Engine) -> None:
        self._name, self._schedule, self._run, self._engine = phase.name, schedule, run, engine
        self._steps = Steps(phase, schedule, engine)
        self.history: list[dict[str, float]] = []
        self.saved = 0

    def train(self) -> None:
        """Train to the end of the phase."""
        if self._engine.is_main:
            sweep_partial(self._run.folder)
        newest = newest_checkpoint(self._run) if self._run.resume else None
        if newest is not None:
            self._restore(newest)
        with scalars(self._log_dir(), self._name, self.saved) as log:
            while not self._finished():
                self._epoch(log)
        self._steps.finish()
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
        terms = self._steps.run_epoch(epoch)
        entry = {"epoch": epoch + 1, **terms, **self._steps.validate()}
        self.history.append(entry)
        if self._out_of_patience():
            entry["stopped_early"] = 1.0
        if self._engine.is_main:
            self._save()
        self.saved = epoch + 1
        log.write(entry)
        self._tell(entry, time.monotonic() - started)

    def _out_of_patience(self) -> bool:
        scores = [entry["score"] for entry in self.history]
        waited = len(scores) - 1 - scores.index(max(scores))
        return self._schedule.patience is not None and waited >= self._schedule.patience

    def _tell(self, entry: Mapping[str, float], seconds: float) -> None:
        epochs = str(self._schedule.epochs)
        number = str(int(entry["epoch"])).rjust(len(epochs))
        say(
            f"{self._name} {number}/{epochs}: loss {entry['loss']:.3f}, "
            f"score {entry['score']:.3f}, {seconds:.0f} s"
        )
        if "stopped_early" in entry:
            say(f"{self._name}: stopped early, no better score in {self._schedule.patience} epochs")

    def _save(self) -> None:
        content = {
            "epoch": len(self.history),
            **self._steps.state(),
            "best_metric": max(entry["score"] for entry in self.history),
            "config": dict(self._run.config),
            "history": self.history,
            **self._run.extra,
        }
        improved = all(merit(self.history[-1]) > merit(past) for past in self.history[:-1])
        if improved and self._run.best_path is not None:
            save_checkpoint(self._run.best_path, content)
        name = f"{self._run.prefix}_epoch_{len(self.history):04d}.pt"
        save_checkpoint(self._run.folder / name, content)
        for stale in checkpoints(self._run)[: -self._run.keep]:
            stale.unlink()

    def _restore(self, path: Path) -> None:
        content = load_checkpoint(path, STATE)
        require_same_recipe(path, content["config"], self._run.config)
        self._steps.restore(content, path)
        self.history = list(content["history"])
        self.saved = len(self.history)
        say(f"{self._name}: resuming after epoch {self.saved}")


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
