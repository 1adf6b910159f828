"""What engines that replay have in common: shapes are fixed, so each size of batch has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends.session import Arrays, failure
from cdt_runtime.errors import BackendError

BATCH = "batch"
"""Name of the dimension that a call may choose freely."""

KEPT = 8
"""Sizes that are kept a graph; the one that was unused for longest makes room."""


@dataclass(frozen=True)
class Input:
    """What a graph takes.

    Attributes:
        shape: sizes, and the names of those that are free.
        dtype: of the elements.
    """

    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]


class Fixed(Protocol):
    """A graph of fixed shapes."""

    def run(self, inputs: Arrays, count: int) -> dict[str, NDArray[Any]]:
        """Run it; of each batched output the first `count` rows come back."""


class ShapedSession(ABC):
    """A graph with free sizes, on an engine that knows fixed ones.

    Args:
        inputs: what the graph takes, by name.
        engine: as results name it.
        half: whether it may compute in a half precision that the graph does not ask for.
    """

    def __init__(self, inputs: Mapping[str, Input], engine: str, half: bool) -> None:
        self._inputs, self.engine, self.half = dict(inputs), engine, half
        self._fixed: dict[tuple[int, ...], Fixed] = {}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph; a batch is filled up to the next power of two.

        Raises:
            BackendError: the engine refused the inputs or ran out of memory.
        """
        return self._run(inputs, self._sizes(inputs))

    def _run(self, inputs: Arrays, sizes: dict[str, int]) -> dict[str, NDArray[Any]]:
        count = sizes.get(BATCH, 1)
        if BATCH in sizes:
            sizes[BATCH] = 1 << (count - 1).bit_length()
        key = tuple(sizes.values())
        fixed = self._fixed.pop(key, None) or self._open(sizes)
        self._fixed[key] = fixed  # the newest is last
        while len(self._fixed) > KEPT:
            del self._fixed[next(iter(self._fixed))]
        try:
            return fixed.run(inputs, count)
        except Exception as error:  # each engine has classes of its own
            raise failure(self.engine, error) from error

    @abstractmethod
    def _open(self, sizes: Mapping[str, int]) -> Fixed:
        """Make what runs these sizes of the free dimensions.

        Raises:
            BackendError: the engine can't.
        """

    @property
    def _batched(self) -> list[str]:
        """The inputs that have a row for each item of the batch."""
        return [name for name, one in self._inputs.items() if BATCH in one.shape]

    def _sizes(self, inputs: Arrays) -> dict[str, int]:
        """The sizes that this call gives the free dimensions.

        Raises:
            BackendError: two inputs disagree, or one is missing, empty or of another rank or type.
        """
        sizes: dict[str, int] = {}
        for name, expected in self._inputs.items():
            if name not in inputs:
                raise BackendError(f"{self.engine}: input {name} is missing")
            given = inputs[name]
            fits = len(given.shape) == len(expected.shape) and all(
                0 < size == (symbol if isinstance(symbol, int) else sizes.setdefault(symbol, size))
                for size, symbol in zip(given.shape, expected.shape, strict=True)
            )
            # The device takes bytes as they are: another type would be read as this one.
            if not fits or given.dtype != expected.dtype:
                raise BackendError(
                    f"{self.engine}: input {name}: expected {expected.dtype} "
                    f"{list(expected.shape)}, found {given.dtype} {list(given.shape)}"
                )
        return sizes
