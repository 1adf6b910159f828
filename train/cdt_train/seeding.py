"""Which random numbers a step of training draws."""

from __future__ import annotations

_STRIDE = 1_000_003
"""More than the steps of any phase; 4294 seeds fit into the 32 bits that torch takes in."""


def step_seed(seed: int, index: int) -> int:
    """Return a seed for one step of a phase, another for each pair of `seed` and `index`.

    Args:
        seed: of the run.
        index: of the micro-step since the start of the phase.
    """
    return seed * _STRIDE + index
