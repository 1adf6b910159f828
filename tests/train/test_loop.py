from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.loop import Run, Schedule, newest_checkpoint, train_phase

SCHEDULE = Schedule(epochs=4, steps=5, learning_rate=1e-2, weight_decay=0.1, warmup=0.1)
CONFIG = {"training": {"seed": 0}}


class Toy:
    """Fits a line to noise; stops itself, as a kill would, at a chosen epoch."""

    name = "toy"

    def __init__(self, stop_at: int | None = None, poison: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self._generator = torch.Generator()
        self._stop_at, self._poison = stop_at, poison
        self._epoch = 0

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        self._epoch = index // SCHEDULE.steps
        if self._epoch == self._stop_at:
            raise KeyboardInterrupt
        self._generator.manual_seed(index)
        torch.manual_seed(index)
        inputs = torch.randn(16, 4, generator=self._generator)
        loss = (self.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        return {"loss": loss * (float("nan") if self._poison and self._epoch == 2 else 1)}

    def validate(self) -> dict[str, float]:
        return {"score": -abs(self._epoch - 1.0)}


def run(folder: Path, **options: object) -> Run:
    return Run(folder, "toy", CONFIG, best_path=folder / "best.pt", **options)  # type: ignore[arg-type]


def weights(phase: Toy) -> list[Tensor]:
    return [value.clone() for value in phase.model.state_dict().values()]


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole = Toy()
    history = train_phase(whole, SCHEDULE, run(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train_phase(Toy(stop_at=2), SCHEDULE, run(tmp_path / "parts"))
    resumed = Toy()
    again = train_phase(resumed, SCHEDULE, run(tmp_path / "parts", resume=True))
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_checkpoints_hold_what_users_of_the_field_expect(tmp_path: Path) -> None:
    train_phase(Toy(), SCHEDULE, run(tmp_path, extra={"note": "x"}))
    content = torch.load(tmp_path / "toy_epoch_0004.pt", weights_only=True)
    assert set(content) == {
        "epoch",
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "scaler_state_dict",
        "micro_steps",
        "best_metric",
        "config",
        "history",
        "note",
    }
    assert content["epoch"] == 4


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    train_phase(Toy(), SCHEDULE, run(tmp_path, keep=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", "toy_epoch_0003.pt", "toy_epoch_0004.pt"]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2
    assert newest_checkpoint(run(tmp_path)) == tmp_path / "toy_epoch_0004.pt"


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy: loss is nan at epoch 3, step 1: lower the"):
        train_phase(Toy(poison=True), SCHEDULE, run(tmp_path))
    newest = newest_checkpoint(run(tmp_path))
    assert newest is not None
    state = torch.load(newest, weights_only=True)["model_state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    train_phase(Toy(), SCHEDULE, run(tmp_path))
    other = Run(tmp_path, "toy", {"training": {"seed": 1}}, resume=True)
    with pytest.raises(CheckpointError, match=r"was trained with training\.seed=0, now 1: resume"):
        train_phase(Toy(), SCHEDULE, other)


def test_the_rate_rises_then_falls_to_zero(tmp_path: Path) -> None:
    train_phase(Toy(), SCHEDULE, run(tmp_path))
    content = torch.load(tmp_path / "toy_epoch_0004.pt", weights_only=True)
    assert content["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    first = torch.load(tmp_path / "toy_epoch_0002.pt", weights_only=True)
    assert 0 < first["optimizer_state_dict"]["param_groups"][0]["lr"] < 1e-2
