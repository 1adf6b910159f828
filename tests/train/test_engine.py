from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import nn

from cdt_runtime.errors import TrainingError
from cdt_train.engine import Engine, choose_device, choose_precision
from cdt_train.loop import Run, Schedule, train_phase


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Start two processes on this machine and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and stderr of two real processes."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(processes.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.fixture(scope="module")
def together(started: tuple[Path, str]) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return [torch.load(started[0] / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Over all weights and buffers, averaged and live."""
    return max(
        float((a.double() - b.double()).nan_to_num(0).abs().max())
        for part in ("averaged", "live")
        for a, b in zip(first[part].values(), second[part].values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("case", "accumulate"), [("one", 2), ("two", 4)])
def test_two_processes_do_the_work_of_one_with_twice_the_micro_steps(
    together: list[dict[str, Any]], tmp_path: Path, case: str, accumulate: int
) -> None:
    alone = processes.outcome(tmp_path, accumulate)
    for each in together:
        assert largest_difference(each[case], alone) < 1e-5
        for mine, others in zip(each[case]["history"], alone["history"], strict=True):
            assert mine == pytest.approx(others, abs=1e-5)
    assert alone["history"][0]["index"] == pytest.approx((3 * accumulate - 1) / 2)
    assert set(alone["history"][0]) == {"epoch", "loss", "index", "odd", "score"}


@pytest.mark.slow
def test_the_comparison_would_notice_processes_that_do_the_same_work(
    together: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = processes.outcome(tmp_path, 2)
    assert largest_difference(together[0]["same_index"], alone) > 1e-3


@pytest.mark.slow
def test_both_processes_end_with_the_same_model(together: list[dict[str, Any]]) -> None:
    first, second = (each["one"] for each in together)
    assert largest_difference(first, second) == 0
    assert largest_difference({**first, "averaged": first["saved"]}, first) == 0
    assert first["live"]["norm.num_batches_tracked"] == 6
    assert first["mask"].tolist() == [0, -torch.inf]
    assert largest_difference({**first, "averaged": first["live"]}, first) > 1e-3


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(
    together: list[dict[str, Any]],
) -> None:
    message = "lines: loss is inf at epoch 2, step 1: lower the learning rate; --resume goes on"
    assert all(each["failure"].startswith(message) for each in together)


@pytest.mark.slow
def test_only_the_first_process_speaks_and_writes(started: tuple[Path, str]) -> None:
    folder, err = started
    assert err.count("lines 1/2: loss") == 4  # three runs and the one that failed
    assert "Warning" not in err  # of accelerate or torch
    assert len(list((folder / "logs").rglob("events.out.tfevents.*"))) == 3


@pytest.mark.slow
def test_the_command_trains_in_two_processes(
    phantom_dir: Path, tiny_recipe: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "models"
    arguments = ("--data-dir", phantom_dir, "--output-dir", output, "training.device=cpu")
    done = torchrun("-m", "cdt_train.cli", *arguments, *tiny_recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next      cdt-export --checkpoint") == 1
    assert done.stderr.count("phase 1 (CT) 2/2: loss") == 1
    assert torch.load(output / "best_model.pt", weights_only=True)["micro_steps"] == 2
    assert (output / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_automatic_precision_on_a_cpu_hangs_on_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    engine = Engine.start(device="cpu")
    assert (engine.precision, engine.device.type) == (expected, "cpu")
    assert (engine.processes, engine.rank, engine.is_main) == (1, 0, True)


def test_a_second_engine_may_differ_from_the_first() -> None:
    Engine.start(device="cpu", precision="fp32")
    assert Engine.start(device="cpu", precision="bf16").accelerator.mixed_precision == "bf16"


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    prepared = Engine.start(device="cpu", precision="bf16").prepare(nn.Sequential(layer))
    assert prepared(torch.ones(1, 2)).dtype == torch.float32
    assert (seen, layer.weight.dtype) == ([torch.bfloat16], torch.float32)


@pytest.mark.parametrize(
    ("layer", "expected"), [(nn.Conv2d(1, 1, 1), torch.bfloat16), (nn.Conv3d(1, 1, 1), torch.float)]
)
def test_a_cpu_computes_3d_convolutions_in_fp32(
    tmp_path: Path, layer: nn.Conv2d | nn.Conv3d, expected: torch.dtype
) -> None:
    seen = []
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))

    class OneLayer:
        name = "one layer"
        model: nn.Module = layer

        def step(self, index: int, progress: float) -> dict[str, torch.Tensor]:
            return {"loss": layer(torch.ones(1, 1, *(1,) * len(layer.kernel_size))).sum()}

        def validate(self) -> dict[str, float]:
            return {"score": 0.0}

    engine = Engine.start(device="cpu", precision="bf16")
    train_phase(OneLayer(), Schedule(1, 1, 1e-3, 0.0, 0.0), Run(tmp_path, "one", {}), engine)
    assert seen == [expected]


def test_what_is_not_to_be_had_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"^training\.precision=fp16 needs a GPU: use train"):
        Engine.start(device="cpu", precision="fp16")


def test_a_gpu_is_never_shared_by_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # stands in for a GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes for 1 GPUs: start as many as there are"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(("known", "expected"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_on_a_gpu_hangs_on_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, known: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: known)  # for a GPU
    assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("fp16", torch.device("cuda")) == "fp16"


def test_two_processes_share_out_the_micro_steps() -> None:
    class Two:
        num_processes = 2
        process_index = 0

    first, second = Two(), Two()
    second.process_index = 1
    engines = [Engine(accelerator, accumulate=3) for accelerator in (first, second)]
    indices = [e.micro_index(step, m) for step in (0, 1) for m in range(3) for e in engines]
    assert indices == list(range(12))
