"""Averages of weights and buffers: over time (EMA), and over the micro-steps of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cdt_train.engine import Engine


class WeightAverage:
    """Exponential moving average of a model's weights and floating-point buffers.

    The decay warms up as (1 + n) / (10 + n) over the n steps done, so that early epochs are not
    stuck at the first weights.

    Args:
        model: copied.
        decay: top of the decay, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True)

    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self._averaged.update_parameters(model)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Give the model its averaged weights for a while."""
        live = [tensor.clone() for tensor in _tensors(model)]
        self.put(model)
        try:
            yield
        finally:
            _copy(live, _tensors(model))

    def put(self, model: nn.Module) -> None:
        """Give the model its averaged weights for good."""
        _copy(_tensors(self._averaged.module), _tensors(model))

    @property
    def updates(self) -> int:
        """Steps taken in so far."""
        return int(self._averaged.n_averaged.item())

    def restore(self, model: nn.Module, updates: int) -> None:
        """Go on from a model that holds the averaged weights of so many steps."""
        _copy(_tensors(model), _tensors(self._averaged.module))
        self._averaged.n_averaged.fill_(updates)

    @torch.no_grad()
    def _blend(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int
    ) -> None:
        share = 1 - min(self._decay, (1 + int(updates)) / (10 + int(updates)))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                blended = old.lerp(new, share)
                # A constant such as minus infinity is no number after blending.
                new = torch.where(torch.isfinite(blended), blended, new)
            old.copy_(new)


class MicroBuffers:
    """Buffers of a model in a step of several micro-steps, in one process or several.

    Every micro-step starts from the same buffers. After the step a floating-point buffer has moved
    by the mean of all moves, any other is as the last micro-step left it: two processes end as one
    process with twice the micro-steps.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._needed = engine.micro_steps > 1
        self._start: list[Tensor] = []
        self._moves: list[Tensor] = []

    @torch.no_grad()
    def before(self, micro: int) -> None:
        """Set the buffers back to where the step began."""
        if not self._needed:
            return
        if micro == 0:
            self._start = [buffer.clone() for buffer in self._model.buffers()]
            self._moves = [torch.zeros_like(b, dtype=torch.float64) for b in _floats(self._start)]
        else:
            _copy(self._start, list(self._model.buffers()))

    @torch.no_grad()
    def after(self) -> None:
        """Note how far a micro-step moved the buffers."""
        if not self._needed:
            return
        pairs = zip(_floats(self._start), _floats(self._model.buffers()), strict=True)
        for move, (start, now) in zip(self._moves, pairs, strict=True):
            # Where nothing moved, an infinite constant would give no number.
            move += torch.where(start == now, 0.0, now.double() - start.double())

    @torch.no_grad()
    def close(self) -> None:
        """Move the buffers by the mean of all micro-steps of all processes."""
        if not self._needed:
            return
        if self._moves:
            flat = torch.cat([move.flatten() for move in self._moves])
            mean = self._engine.sum(flat) / self._engine.micro_steps
            parts = torch.split(mean, [move.numel() for move in self._moves])
            places = zip(_floats(self._start), _floats(self._model.buffers()), parts, strict=True)
            for start, buffer, part in places:
                buffer.copy_(start.double() + part.view_as(start))
        for buffer in self._model.buffers():
            if not buffer.is_floating_point():
                buffer.copy_(self._engine.from_last(buffer))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _floats(tensors: list[Tensor] | Iterator[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
