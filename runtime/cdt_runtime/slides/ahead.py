"""Work ahead: a thread makes items, a few at a time, while the caller uses the last."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

WAIT_S = 0.1
"""How long a full queue is waited for before looking whether anyone still listens."""


@dataclass(frozen=True)
class _End:
    """Nothing follows; `error` is what the maker raised, if it did."""

    error: BaseException | None


class _Maker(Generic[T]):
    def __init__(self, items: Iterable[T], count: int) -> None:
        self._items = items
        self.made: queue.Queue[T | _End] = queue.Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _make(self) -> None:
        end = _End(None)
        try:
            for item in self._items:
                self._put(item)
                if self._stopped.is_set():
                    break
        except BaseException as error:  # raised again where the items are used
            end = _End(error)
        finally:
            if hasattr(self._items, "close"):
                self._items.close()
        self._put(end)

    def _put(self, item: T | _End) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self.made.put(item, timeout=WAIT_S)
                return


def ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """Make items in a thread of their own, at most `count` before they are asked for.

    What the maker raises is raised here, after the items before it. The thread ends with this
    iterator, also where that is closed early.
    """
    maker = _Maker(items, count)
    try:
        while not isinstance(item := maker.made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        maker.stop()
