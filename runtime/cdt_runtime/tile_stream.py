"""Tiles to answers in the order given, read ahead of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import InputError
from cdt_runtime.parallel import mapped
from cdt_runtime.prediction import Context, Prediction, TileInput


@dataclass(frozen=True)
class Failure:
    """A tile that could not be used, and why."""

    tile: str
    error: InputError


def read_ahead(
    classifier: FewShotClassifier,
    tiles: Sequence[str],
    names: Sequence[str],
    reading: Mapping[str, Any],
) -> Iterator[TileInput | Failure]:
    """Read tiles in threads, two batches ahead.

    Args:
        classifier: that they are for.
        tiles: paths.
        names: to show, one each.
        reading: as `FewShotClassifier.read` takes it.
    """

    def read(item: tuple[str, str]) -> TileInput | Failure:
        tile, name = item
        try:
            return replace(classifier.read(tile, **reading), name=name)
        except InputError as error:
            return Failure(name, error)

    return mapped(read, zip(tiles, names, strict=True), 2 * classifier.batch_size)


def answers(
    classifier: FewShotClassifier, inputs: Iterable[TileInput | Failure], context: Context
) -> Iterator[Prediction | Failure]:
    """Classify in batches; a failure keeps its tile's place between the answers."""
    waiting: list[TileInput] = []
    for found in inputs:
        if isinstance(found, Failure):
            yield from classifier.predict_each(waiting, context)
            yield found
            waiting = []
            continue
        waiting.append(found)
        if len(waiting) >= classifier.batch_size:
            yield from classifier.predict_each(waiting, context)
            waiting = []
    yield from classifier.predict_each(waiting, context)
