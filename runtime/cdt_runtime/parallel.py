"""Work in threads, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cdt_runtime.cores import available_cores

T = TypeVar("T")
R = TypeVar("R")


def mapped(function: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """Apply a function to items in threads, and give the results in the items' order.

    Args:
        function: safe in several threads; what it raises is raised in its result's place.
        items: any number.
        window: how many results may be made before they are asked for.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(available_cores()) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
