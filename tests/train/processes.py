"""What each of several processes runs in test_engine.py: `torchrun processes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdt_runtime.errors import TrainingError
from cdt_train.engine import Engine
from cdt_train.loop import Run, Schedule, train_phase

SCHEDULE = Schedule(
    epochs=2, steps=3, learning_rate=1e-2, weight_decay=0.1, warmup=0.2, ema_decay=0.9
)


class Net(nn.Module):
    """Has all that processes could disagree on: statistics, counters, a part used now and then."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.seldom = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)

    def forward(self, inputs: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            self.centre.lerp_(inputs.mean(dim=0), 0.1)
        hidden = self.drop(self.norm(self.first(inputs - self.centre)).tanh())
        if index % 2:
            hidden = hidden + self.seldom(hidden)
        result: Tensor = self.last(hidden)
        return result


class Lines:
    """Fits lines; every number hangs on the index of the step."""

    name = "lines"

    def __init__(self, poisoned: int | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model: nn.Module = Net()
        self._poisoned = poisoned

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(16, 4, generator=generator) + index % 3
        error = self.model(inputs, index) - inputs.sum(dim=1, keepdim=True)
        loss = error.square().mean() * (float("inf") if index == self._poisoned else 1)
        odd = {"odd": loss * 2} if index % 2 else {}
        return {"loss": loss, "index": torch.tensor(float(index)), **odd}

    def validate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return {"score": -float((self.model(torch.ones(4, 4), 1) - 4).square().mean())}


class SameIndex(Engine):
    """An engine with the bug that the comparison is there to find."""

    def micro_index(self, step: int, micro: int) -> int:
        return step * self.micro_steps + micro * self.processes


def outcome(folder: Path, accumulate: int, kind: type[Engine] = Engine) -> dict[str, Any]:
    """Train and return all weights and buffers, averaged and live, and the history."""
    engine = kind.start(device="cpu", accumulate=accumulate, log_dir=folder / "logs")
    run = Run(folder / kind.__name__ / str(engine.micro_steps), "lines", {})
    history = train_phase(phase := Lines(), SCHEDULE, run, engine)
    content = torch.load(run.folder / "lines_epoch_0002.pt", weights_only=True)
    return {
        "averaged": phase.model.state_dict(),
        "mask": phase.model.mask,
        "saved": content["model_state_dict"],
        "live": content["live_state_dict"],
        "history": history,
    }


def failure(folder: Path) -> str:
    """Train with a loss that is not finite in the last process alone."""
    engine = Engine.start(device="cpu")
    try:
        train_phase(Lines(poisoned=7), SCHEDULE, Run(folder / "failure", "lines", {}), engine)
    except TrainingError as error:
        return str(error)
    return "trained on"


def main(folder: Path) -> None:
    found = {
        "one": outcome(folder, 1),
        "two": outcome(folder, 2),
        "same_index": outcome(folder, 1, SameIndex),
        "failure": failure(folder),
    }
    engine = Engine.start(device="cpu")
    torch.save(found, folder / f"rank_{engine.rank}.pt")
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
