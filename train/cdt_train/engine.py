"""The machine that a phase trains on: device, precision, processes, accumulation.

One process is started plainly, several by `torchrun --nproc-per-node 2 -m cdt_train.cli ...`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cdt_runtime.errors import TrainingError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
T = TypeVar("T")

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, eq=False)
class Engine:
    """What runs the steps of a phase; made by `Engine.start`.

    Attributes:
        accelerator: of Hugging Face Accelerate.
        precision: `fp32`, `bf16` or `fp16`.
        accumulate: micro-steps of one process before its optimiser moves.
        log_dir: where TensorBoard's files go, or None for none.
    """

    accelerator: Any
    precision: str = "fp32"
    accumulate: int = 1
    log_dir: Path | None = None

    @classmethod
    def start(
        cls,
        device: Device = "auto",
        precision: Precision = "auto",
        accumulate: int = 1,
        log_dir: Path | None = None,
    ) -> Engine:
        """Join the other processes, if there are any, and choose device and precision.

        Args:
            device: `auto` takes a GPU where there is one.
            precision: `auto` is bf16 on a GPU or CPU that knows it, else fp32: a CPU that does not
                know bf16 takes ten times as long with it.
            accumulate: micro-steps of one process before its optimiser moves.
            log_dir: where TensorBoard's files go.

        Raises:
            TrainingError: the device or the precision can't be had here.
        """
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        chosen = choose_device(device)
        kind = choose_precision(precision, chosen)
        # Averages and optimiser states decay into denormals, which a CPU multiplies very slowly.
        torch.set_flush_denormal(True)
        # Accelerate keeps one state a process and would refuse a second engine with another.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision=_ACCELERATE_NAMES[kind],
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
            ],
        )
        return cls(accelerator, kind, accumulate, log_dir)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def micro_steps(self) -> int:
        """Micro-steps of all processes to one step of the optimiser."""
        return self.accumulate * self.processes

    def micro_index(self, step: int, micro: int) -> int:
        """Number of a micro-step of this process since the start of the phase.

        Args:
            step: of the optimiser, since the start of the phase.
            micro: within the step, 0 to `accumulate` - 1.
        """
        return step * self.micro_steps + micro * self.processes + self.rank

    def prepare(self, module: nn.Module) -> nn.Module:
        """Wrap a module for its precision and, with several processes, for shared gradients."""
        with warnings.catch_warnings():
            # Its successor is not in the older versions of torch that run here too.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            prepared: nn.Module = self.accelerator.prepare_model(module)
        return prepared

    def sharing(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Hold gradients back until the last micro-step of a step, then share them."""
        context: AbstractContextManager[Any] = (
            nullcontext() if last else self.accelerator.no_sync(module)
        )
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-step."""
        loss = loss / self.accumulate
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> bool:
        """Clip the gradients and move the weights.

        Returns:
            False where fp16 gradients overflowed: the step was left out and the scale lowered.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            clip()
            optimizer.step()
            return True
        scaler.unscale_(optimizer)
        clip()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return bool(scaler.get_scale() >= before)

    def scaler_state(self) -> dict[str, Any]:
        """State of the gradient scaler, empty without one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore_scaler(self, state: dict[str, Any]) -> None:
        """Take up the state of an earlier scaler."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def from_last(self, values: Tensor) -> Tensor:
        """Return the tensor of the last process on all of them."""
        if self.processes == 1:
            return values
        from accelerate.utils import broadcast

        sent: Tensor = broadcast(values, from_process=self.processes - 1)
        return sent

    def gather(self, value: T) -> list[T]:
        """Return the plain values of all processes, in their order."""
        if self.processes == 1:
            return [value]
        from accelerate.utils import gather_object

        values: list[T] = gather_object([value])
        return values

    def wait(self) -> None:
        """Wait for the other processes."""
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Let go of what was prepared."""
        self.accelerator.free_memory()

    def close(self) -> None:
        """Leave the other processes, at the end of a run."""
        self.accelerator.end_training()


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        TrainingError: a GPU was asked for and there is none, or fewer than processes.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise TrainingError(
            "training.device=cuda: torch finds no GPU here: use training.device=cpu"
        )
    if not available or wanted == "cpu":
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise TrainingError(
            f"{processes} processes for {gpus} GPUs: start as many as there are GPUs, or use "
            f"training.device=cpu"
        )
    return torch.device("cuda")


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return the precision to train in.

    Raises:
        TrainingError: the device can't train in it.
    """
    on_gpu = device.type == "cuda"
    if wanted == "auto":
        known = torch.cuda.is_bf16_supported(False) if on_gpu else _cpu_knows_bf16()
        return "bf16" if known else "fp32"
    if wanted == "fp16" and not on_gpu:
        raise TrainingError(
            "training.precision=fp16 needs a GPU: use training.precision=fp32, or bf16 on a CPU "
            "that knows it"
        )
    return wanted


def _cpu_knows_bf16() -> bool:
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
