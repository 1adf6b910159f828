"""One thread for all engine calls; tiles that wait for it share the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cdt_runtime.audit import AuditLog, of_answer, of_change
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.cores import available_cores
from cdt_runtime.enroll import adding, facts_of, new_tiles, write_change
from cdt_runtime.prediction import Context, Prediction, TileInput
from cdt_runtime.report import distinct_names
from cdt_runtime.serve.metrics import Metrics
from cdt_runtime.serve.scans import Scans

T = TypeVar("T")


@dataclass(eq=False)
class _Waiting:
    tile: TileInput
    context: Context
    answer: asyncio.Future[Prediction]


class Engine:
    """Answers requests of one event loop with one classifier.

    While a batch runs, requests that come wait together and go in the next: a request alone never
    waits for others.

    Args:
        classifier: to ask; `enrol` puts another in its place.
        scans: that requests may name.
        metrics: to count in.
        log: that answers and changes go into, too.
    """

    def __init__(
        self,
        classifier: FewShotClassifier,
        scans: Scans,
        metrics: Metrics,
        log: AuditLog | None = None,
    ) -> None:
        self.classifier, self.scans = classifier, scans
        self._metrics, self._log = metrics, log
        self._thread = ThreadPoolExecutor(1, "engine")
        self._readers = ThreadPoolExecutor(available_cores() + 1, "read")
        self._waiting: deque[_Waiting] = deque()
        self._drain: asyncio.Task[None] | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Do something with the classifier, between batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def read(self, path: Path, name: str, **reading: Any) -> TileInput:
        """Read a tile beside the engine.

        Raises:
            TileError: it can't be used.
        """
        classifier = self.classifier
        loop = asyncio.get_running_loop()
        tile = await loop.run_in_executor(self._readers, lambda: classifier.read(path, **reading))
        return replace(tile, name=name)

    async def context(self, name: str | None) -> Context:
        """The context of a CT by its name, or that of none.

        Raises:
            SeriesError: the CT can't be used.
            InputError: there is none of that name.
        """
        loop = asyncio.get_running_loop()
        if not name:
            return self.classifier.context(None)
        known = await loop.run_in_executor(self._readers, self.scans.get, name)
        if known is not None:
            return known
        return await self.run(lambda: self._encoded(name))

    def _encoded(self, name: str) -> Context:
        context = self.classifier.context(self.scans.folder(name))
        self.scans.put(name, context)
        return context

    async def classify(self, tile: TileInput, context: Context) -> Prediction:
        """Classify a tile, in a batch with others that wait in the same context."""
        waiting = _Waiting(tile, context, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._answer_all())
        return await waiting.answer

    async def _answer_all(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            if not batch:
                continue
            self._metrics.batches.observe(len(batch))
            try:
                found = await self.run(lambda batch=batch: self._predict(batch))  # type: ignore[misc]
            except Exception as error:  # each request tells its own client
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, prediction in zip(batch, found, strict=True):
                if not one.answer.done():
                    one.answer.set_result(prediction)

    def _next_batch(self) -> list[_Waiting]:
        """Take the first that waits and those of its context; who has gone is left out."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        while self._waiting and len(batch) < self.classifier.batch_size:
            one = self._waiting.popleft()
            if one.answer.done():
                continue
            same = not batch or one.context.key == batch[0].context.key
            (batch if same else others).append(one)
        self._waiting.extendleft(reversed(others))
        return batch

    def _predict(self, batch: Sequence[_Waiting]) -> list[Prediction]:
        tiles, context = [one.tile for one in batch], batch[0].context
        found = list(self.classifier.predict_each(tiles, context))
        for answer in found:
            if self._log:  # what was not logged is not said
                self._log.append(of_answer(answer, self.classifier, context))
            self._metrics.answers.labels((answer.reason or "answered").split(":")[0]).inc()
        return found

    async def enrol(
        self, paths: Sequence[Path], label: str, ct: str | None, *, dry_run: bool, **reading: Any
    ) -> dict[str, Any]:
        """Add tiles to a class; from then on the changed bundle answers.

        Raises:
            CdtError: the tiles can't be used, or the bundle can't be changed.
        """
        return await self.run(lambda: self._enrolled(paths, label, ct, dry_run, reading))

    def _enrolled(
        self,
        paths: Sequence[Path],
        label: str,
        ct: str | None,
        dry_run: bool,
        reading: dict[str, Any],
    ) -> dict[str, Any]:
        classifier = self.classifier
        tiles = [(str(path), label) for path in paths]
        scan = self.scans.folder(ct) if ct else None
        change = adding(classifier, tiles, scan, **reading)
        change = replace(change, names=tuple(distinct_names([path for path, _ in tiles])))
        bundle = classifier.bundle
        if not dry_run:
            bundle = write_change(bundle, change)
            if self._log:
                before = classifier.bundle
                self._log.append(of_change("enroll", before, bundle, new_tiles(change)))
            self.classifier = FewShotClassifier(
                bundle,
                backend=classifier.backend,
                precision=classifier.precision,
                tta=classifier.tta,
                coverage=classifier.coverage,
            )
            self.scans.forget()
        return facts_of(change, bundle, written=not dry_run)

    def close(self) -> None:
        """Wait for what is being done, and end the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)
