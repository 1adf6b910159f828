from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.engine import Engine
from cdt_train.loop import Run, Schedule, newest_checkpoint, train_phase
from cdt_train.rates import Rates, build_optimizer

SCHEDULE = Schedule(epochs=4, steps=5, learning_rate=1e-2, weight_decay=0.1, warmup=0.1)
FULL = replace(SCHEDULE, schedule="plateau", ema_decay=0.9, patience=3, seed=5)
CONFIG = {"training": {"seed": 0}}


class Toy:
    """Fits a line to noise; stops itself, as a kill would, at a chosen epoch."""

    name = "toy"

    def __init__(
        self, stop_at: int | None = None, poison: bool = False, accumulate: int = 1
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
            self.model: nn.Module = nn.Sequential(*layers)
        self._generator = torch.Generator()
        self._stop_at, self._poison = stop_at, poison
        self._steps = SCHEDULE.steps * accumulate
        self._epoch = 0

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        self._epoch = index // self._steps
        if self._epoch == self._stop_at:
            self._stop()
        self._generator.manual_seed(index)
        inputs = torch.randn(16, 4, generator=self._generator)
        loss = (self.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        return {"loss": loss * (float("nan") if self._poison and self._epoch == 2 else 1)}

    def _stop(self) -> None:
        raise KeyboardInterrupt

    def validate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            error = float(self.model(torch.ones(2, 4)).sub(4).square().mean())
        return {"score": -abs(self._epoch - 1.0), "val_loss": error}


def run(folder: Path, **options: object) -> Run:
    return Run(folder, "toy", CONFIG, best_path=folder / "best.pt", **options)  # type: ignore[arg-type]


def weights(phase: Toy) -> list[Tensor]:
    return [value.clone() for value in phase.model.state_dict().values()]


def scaled(accumulate: int = 1) -> Engine:
    """An engine on the CPU with the gradient scaler that fp16 brings on a GPU."""
    engine = Engine.start(device="cpu", precision="fp32", accumulate=accumulate)
    engine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    return engine


def same(first: object, second: object) -> bool:
    """Whether nested values agree to the last bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("schedule", [SCHEDULE, FULL], ids=["plain", "full"])
def test_a_run_killed_at_any_epoch_ends_bit_for_bit_as_one_never_stopped(
    tmp_path: Path, schedule: Schedule
) -> None:
    whole = Toy(accumulate=2)
    history = train_phase(whole, schedule, run(tmp_path / "whole"), scaled(2))
    for stop_at in range(4):
        folder = tmp_path / f"killed_{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            train_phase(Toy(stop_at=stop_at, accumulate=2), schedule, run(folder), scaled(2))
        resumed = Toy(accumulate=2)
        again = train_phase(resumed, schedule, run(folder, resume=True), scaled(2))
        assert again == history
        assert same(weights(whole), weights(resumed))
        last = [
            torch.load(place / "toy_epoch_0004.pt", weights_only=True)
            for place in (tmp_path / "whole", folder)
        ]
        assert same(*last)
    assert last[0]["scaler_state_dict"]["scale"] > 8


def test_a_finished_phase_is_taken_up_with_its_averaged_weights(tmp_path: Path) -> None:
    first = Toy()
    history = train_phase(first, FULL, run(tmp_path))
    again = Toy()
    assert train_phase(again, FULL, run(tmp_path, resume=True)) == history
    assert same(weights(first), weights(again))


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
        "content_sha256",
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


def test_what_is_validated_and_kept_is_the_moving_average(tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, epochs=2, steps=2, ema_decay=0.3)
    expected: dict[str, Tensor] = {}

    class Watched(Toy):
        def step(self, index: int, progress: float) -> dict[str, Tensor]:
            if index > 0:
                self.average(index - 1)
            return super().step(index, progress)

        def average(self, updates: int) -> None:
            decay = min(0.3, (1 + updates) / (10 + updates)) if updates else 0.0
            for name, new in self.model.state_dict().items():
                old = expected.get(name, new)
                floats = new.is_floating_point()
                expected[name] = old * decay + new * (1 - decay) if floats else new.clone()

    phase = Watched()
    history = train_phase(phase, schedule, run(tmp_path))
    content = torch.load(tmp_path / "toy_epoch_0002.pt", weights_only=True)
    phase.model.load_state_dict(content["live_state_dict"])
    phase.average(3)
    averaged = content["model_state_dict"]
    assert all(torch.allclose(averaged[name], expected[name], atol=1e-6) for name in expected)
    assert not same(averaged, content["live_state_dict"])
    assert averaged["1.num_batches_tracked"] == 4
    phase.model.load_state_dict(averaged)
    assert phase.validate()["val_loss"] == pytest.approx(history[-1]["val_loss"])


def test_averaged_weights_are_not_made_up_on_resume(tmp_path: Path) -> None:
    train_phase(Toy(), SCHEDULE, run(tmp_path))
    with pytest.raises(CheckpointError, match=r"was trained without averaged weights: resume wit"):
        train_phase(Toy(), replace(SCHEDULE, ema_decay=0.9), run(tmp_path, resume=True))


def test_a_phase_stops_early_and_stays_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = replace(SCHEDULE, epochs=9, patience=2)
    history = train_phase(Toy(), schedule, run(tmp_path))  # the second epoch is its best
    assert [entry.get("stopped_early") for entry in history] == [None, None, None, 1.0]
    assert "toy: stopped early, no better score in 2 epochs\n" in capsys.readouterr().err
    assert train_phase(Toy(), schedule, run(tmp_path, resume=True)) == history


def test_a_plateau_lowers_the_rate_after_the_warm_up(tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, epochs=9, warmup=0.2, schedule="plateau")
    train_phase(Toy(), schedule, run(tmp_path, keep=9))
    rates = [
        torch.load(tmp_path / f"toy_epoch_{n:04d}.pt", weights_only=True)["optimizer_state_dict"][
            "param_groups"
        ][0]["lr"]
        for n in range(1, 10)
    ]
    steps = [5 / 9 + 1 / 9, *[1.0] * 3, *[0.3] * 3, *[0.09] * 2]
    assert rates == pytest.approx([1e-2 * step for step in steps])


def test_groups_scale_the_rate_and_freeze(tmp_path: Path) -> None:
    phase = Toy()
    before = {name: value.clone() for name, value in phase.model.state_dict().items()}
    factors = {"0": 0.0, "1": 1.0, "3": 0.1}
    schedule = replace(SCHEDULE, groups=lambda name: factors[name[0]], warmup=0.0)
    train_phase(phase, schedule, run(tmp_path))
    after = phase.model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not phase.model[0].weight.requires_grad  # type: ignore[index]
    assert not torch.equal(after["3.weight"], before["3.weight"])
    groups = build_optimizer(phase.model, schedule).param_groups
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert found == [(1e-2, 0.0, 2), (pytest.approx(1e-3), 0.1, 1), (pytest.approx(1e-3), 0.0, 1)]
    with pytest.raises(TrainingError, match="every weight of the model is frozen: nothing is left"):
        train_phase(Toy(), replace(SCHEDULE, groups=lambda name: 0.0), run(tmp_path))


def test_a_step_that_overflows_is_left_out_and_does_not_use_up_the_rate() -> None:
    layer = nn.Linear(1, 1)
    schedule = replace(SCHEDULE, warmup=1.0)
    optimizer = build_optimizer(layer, schedule)
    rates = Rates(optimizer, schedule)
    engine = scaled()
    before = layer.weight.item()
    engine.backward(layer(torch.full((1, 1), torch.inf)).sum())
    assert not engine.step(optimizer, lambda: None)
    assert (layer.weight.item(), engine.accelerator.scaler.get_scale()) == (before, 4.0)
    optimizer.zero_grad()
    engine.backward(layer(torch.ones(1, 1)).sum())
    assert engine.step(optimizer, lambda: None)
    rates.after_step()
    assert layer.weight.item() != before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * 1e-2 / 20)


def test_micro_steps_add_up_to_the_gradient_of_one_large_step(tmp_path: Path) -> None:
    class Halves(Toy):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 1, bias=False))
            nn.init.ones_(self.model[0].weight)
            self._size = size

        def step(self, index: int, progress: float) -> dict[str, Tensor]:
            rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
            part = rows[index * self._size :][: self._size]
            return {"loss": (self.model(part) - part[:, :1]).square().mean()}

        def validate(self) -> dict[str, float]:
            return {"score": 0.0}

    schedule = replace(SCHEDULE, epochs=1)
    large, small = Halves(8), Halves(4)
    train_phase(large, schedule, run(tmp_path / "a"))
    engine = Engine.start(device="cpu", precision="fp32", accumulate=2)
    train_phase(small, schedule, run(tmp_path / "b"), engine)
    assert torch.allclose(large.model[0].weight, small.model[0].weight, atol=1e-6)  # type: ignore[index]
    assert not torch.allclose(small.model[0].weight, torch.ones(1, 4), atol=1e-3)  # type: ignore[index]


@pytest.mark.parametrize("stop_at", [0, 3])
def test_an_interruption_says_where_a_resume_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_at: int
) -> None:
    class Terminated(Toy):
        def _stop(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    line = f"interrupted after epoch {stop_at} of toy: --resume goes on from there\n"
    for kind in (Toy, Terminated):
        with pytest.raises(KeyboardInterrupt):
            train_phase(kind(stop_at=stop_at), SCHEDULE, run(tmp_path / kind.__name__))
        assert capsys.readouterr().err.endswith(line)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_each_epoch_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = train_phase(Toy(), replace(SCHEDULE, epochs=10), run(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"toy  1/10: loss {history[0]['loss']:.3f}, score -1.000, ")
    assert lines[0].endswith(" s")
    assert lines[9].startswith("toy 10/10: loss")
    assert len(lines) == 10


def test_tensorboard_shows_each_epoch_once_after_a_resume(tmp_path: Path) -> None:
    engine = Engine.start(device="cpu", log_dir=tmp_path / "logs")
    with pytest.raises(KeyboardInterrupt):
        train_phase(Toy(stop_at=3), SCHEDULE, run(tmp_path / "fold_1"), engine)
    (tmp_path / "fold_1" / "toy_epoch_0003.pt").unlink()  # logged, but to be done again
    history = train_phase(Toy(), SCHEDULE, run(tmp_path / "fold_1", resume=True), engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    read = EventAccumulator(str(tmp_path / "logs" / "fold_1" / "toy")).Reload()
    assert set(read.Tags()["scalars"]) == {"toy/loss", "toy/score", "toy/val_loss"}
    shown = read.Scalars("toy/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert [event.value for event in shown] == pytest.approx([e["loss"] for e in history])


def test_layers_draw_by_the_seed_and_leave_the_callers_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = train_phase(Toy(), SCHEDULE, run(tmp_path / "a"))
    assert torch.equal(torch.rand(1), expected)
    assert train_phase(Toy(), SCHEDULE, run(tmp_path / "b")) == first
    assert train_phase(Toy(), replace(SCHEDULE, seed=1), run(tmp_path / "c")) != first


def test_a_resume_with_another_batch_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_phase(Toy(stop_at=2), SCHEDULE, run(tmp_path))
    engine = Engine.start(device="cpu", accumulate=2)
    train_phase(Toy(), SCHEDULE, run(tmp_path, resume=True), engine)
    expected = "warning: toy: a step takes 2 micro-steps, before it took 1: the run won't end as"
    assert expected in capsys.readouterr().err
