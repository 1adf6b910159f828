"""Work in threads, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
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


def side_by_side(
    worker: Callable[[], Callable[[T], object]], items: Iterable[T], most: int
) -> None:
    """Do something with each item, in this thread and in others.

    Threads take an item at a time, with nothing to be kept for each: for thousands of short jobs.

    Args:
        worker: called for each thread; what it gives is called with the items that the thread
            takes, and so can have memory of its own.
        items: any number.
        most: threads, this one among them; there are never more than cores.

    Raises:
        BaseException: what the first item that failed raised; those behind it may be left out.
    """
    waiting = deque(enumerate(items))
    failed: list[tuple[int, BaseException]] = []

    def work(do: Callable[[T], object]) -> None:
        for place, item in _taken(waiting):
            try:
                do(item)
            except BaseException as error:
                waiting.clear()
                failed.append((place, error))

    own, *others = [worker() for _ in range(max(1, min(most, available_cores(), len(waiting))))]
    threads = [Thread(target=work, args=(do,)) for do in others]
    for thread in threads:
        thread.start()
    work(own)
    for thread in threads:
        thread.join()
    if failed:
        raise min(failed, key=lambda pair: pair[0])[1]


def _taken(waiting: deque[T]) -> Iterator[T]:
    """Give what is left, where others may take of it, too."""
    while waiting:
        try:
            item = waiting.popleft()
        except IndexError:  # another thread took the last
            return
        yield item
