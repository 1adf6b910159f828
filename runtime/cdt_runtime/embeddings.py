"""Embeddings of what was classified, with the answers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.anndata_file import write_anndata
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.prediction import Context, Prediction, TileInput
from cdt_runtime.report import bundle_name
from cdt_runtime.tile_stream import Failure

if TYPE_CHECKING:
    from cdt_runtime.slides.job import SlideAnswers

Float = NDArray[np.float32]


class Embedded:
    """Embeds tiles while they pass on their way to the classifier, some at a time.

    Args:
        classifier: whose embeddings they are.
        context: the CT's, or none.
    """

    def __init__(self, classifier: FewShotClassifier, context: Context) -> None:
        self._classifier = classifier
        self._context = classifier.context(None) if classifier.prototypes.ct_off else context
        self._waiting: list[TileInput] = []
        self._parts: list[Float] = []
        self._answers: list[Prediction] = []

    def passing(self, inputs: Iterable[TileInput | Failure]) -> Iterator[TileInput | Failure]:
        """Hand tiles on; those that could not be read have no embedding."""
        for one in inputs:
            if not isinstance(one, Failure):
                self._waiting.append(one)
                if len(self._waiting) >= self._classifier.batch_size:
                    self._embed()
            yield one
        self._embed()

    def _embed(self) -> None:
        if self._waiting:
            tokens = self._classifier.encode(self._waiting)
            self._parts.append(self._classifier.embed_tokens(tokens, self._context))
            self._waiting = []

    def add(self, answer: Prediction) -> None:
        """Take the answer on the next tile, in order."""
        self._answers.append(answer)

    def write(self, path: Path) -> None:
        """Write what has passed.

        Raises:
            InputError: it can't be written.
        """
        (width,) = self._classifier.bundle.output_shape("bridge", "embedding")
        found = self._answers
        columns: dict[str, list[Any]] = {
            "sha256": [one.sha256 for one in found],
            "label": [one.label for one in found],
            "reason": [(one.reason or "").split(":")[0] for one in found],
            "unlikeness": [one.unlikeness for one in found],
        }
        for name in self._classifier.classes:
            columns[f"p_{name}"] = [one.probabilities[name] for one in found]
        embeddings = np.concatenate([np.zeros((0, width), np.float32), *self._parts])
        names = [one.tile for one in found]
        write_anndata(path, embeddings, names, columns, _facts(self._classifier, self._context))


def write_slide_embeddings(
    path: Path,
    classifier: FewShotClassifier,
    slide: Path,
    context: Context,
    found: SlideAnswers,
    **reading: Any,
) -> None:
    """Embed the tiles of a slide, and write them with their places and answers.

    Args:
        path: to write.
        classifier: whose embeddings they are.
        slide: file, which is read once more.
        context: the CT's, or none.
        found: the answers.
        **reading: as `classify_slide` takes them.

    Raises:
        InputError: it can't be written.
    """
    from cdt_runtime.slides.job import embed_slide

    places: list[tuple[int, int]] = []
    parts: list[Float] = []
    for some, embeddings in embed_slide(classifier, slide, context, **reading):
        places += some
        parts.append(embeddings)
    answers = {(one.row, one.column): one for one in found.answers}
    told = [answers[place] for place in places]
    columns: dict[str, list[Any]] = {
        "row": [one.row for one in told],
        "column": [one.column for one in told],
        "tissue": [one.tissue for one in told],
        "label": [one.label for one in told],
        "reason": [one.reason for one in told],
    }
    for at, name in enumerate(classifier.classes):
        columns[f"p_{name}"] = [one.chances[at] if one.chances else None for one in told]
    side = found.plan.grid.full_side
    middles = (np.array(places, np.float64).reshape(-1, 2)[:, ::-1] + 0.5) * side
    (width,) = classifier.bundle.output_shape("bridge", "embedding")
    names = [f"{row}_{column}" for row, column in places]
    whole = np.concatenate([np.zeros((0, width), np.float32), *parts])
    write_anndata(path, whole, names, columns, _facts(classifier, context), middles)


def _facts(classifier: FewShotClassifier, context: Context) -> dict[str, str]:
    counts = context.used is not None and not classifier.prototypes.ct_off
    return {
        "bundle": bundle_name(classifier.bundle),
        "engine": classifier.engine,
        "ct": "in the embeddings" if counts else "not in the embeddings",
    }
