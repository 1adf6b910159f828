"""What an answer rests on: support tiles, parts of the tile, and what else might have come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.prediction import Context, Prediction, TileInput
from cdt_runtime.prototypes import Prototypes, fit_prototypes, softmax

Float = NDArray[np.float32]

GRID = 8
"""Places along each side of a tile that are covered in turn."""

COVERED = 2
"""Width of what is covered, in such places: parts overlap, so that no border is missed."""


@dataclass(frozen=True)
class SupportTile:
    """A support tile, as one answer sees it.

    Attributes:
        sha256: of its file.
        label: its class.
        enrolled: whether it came in on the device, and not with the export.
        similarity: cosine of its embedding and the tile's.
        share: of the similarity of all support tiles, at the scale of the logits; they add up to 1.
        without: class and its probability if this tile were not in the support; None where it is
            the only one of its class.
    """

    sha256: str
    label: str
    enrolled: bool
    similarity: float
    share: float
    without: tuple[str, float] | None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an answer rests on.

    Attributes:
        prediction: the answer.
        likeliest: class with the highest probability, also where there is no answer.
        support: the support tiles, the most similar first.
        relevance: `(GRID, GRID)`, by how much the probability of the likeliest class falls when
            that part of the tile is covered by the tile's mean.
        tile: `(M, S, S)`, the tile input.
    """

    prediction: Prediction
    likeliest: str
    support: tuple[SupportTile, ...]
    relevance: Float
    tile: NDArray[Any]

    @property
    def changed_by_one(self) -> int:
        """Support tiles without any one of which another class would be the likeliest."""
        return sum(
            one.without is not None and one.without[0] != self.likeliest for one in self.support
        )


def find_evidence(classifier: FewShotClassifier, tile: TileInput, context: Context) -> Evidence:
    """Ask what the answer to a tile rests on.

    Args:
        classifier: of the bundle.
        tile: as `FewShotClassifier.read` gives it.
        context: the CT's, or none.

    Raises:
        BackendError: the engine gave no answer.
    """
    (prediction,) = classifier.predict_each([tile], context)
    counted = classifier.context(None) if classifier.prototypes.ct_off else context
    chances = prediction.probabilities
    likeliest = max(chances, key=lambda name: chances[name])
    return Evidence(
        prediction=prediction,
        likeliest=likeliest,
        support=_support(classifier, tile, counted),
        relevance=_relevance(classifier, tile, counted, classifier.classes.index(likeliest)),
        tile=tile.array,
    )


def _support(
    classifier: FewShotClassifier, tile: TileInput, context: Context
) -> tuple[SupportTile, ...]:
    support = classifier.prototypes
    embedded = classifier.embed_support(support, context)
    query = classifier.embed_tokens(classifier.encode([tile]), context)[0]
    scale = support.scale_with_ct if context.used else support.scale
    similar = embedded @ query
    shares = softmax(2 * scale * similar.astype(np.float64))
    enrolled = set() if support.statistics_of is None else set(support.statistics_of.tolist())
    found = [
        SupportTile(
            support.support_sha256[place],
            support.classes[support.labels[place]],
            place in enrolled,
            float(similar[place]),
            float(shares[place]),
            _without(support, embedded, query, scale, place),
        )
        for place in range(len(similar))
    ]
    return tuple(sorted(found, key=lambda one: -one.similarity))


def _without(
    support: Prototypes, embedded: Float, query: Float, scale: float, place: int
) -> tuple[str, float] | None:
    """Class and probability if one support tile were left out."""
    if (support.labels == support.labels[place]).sum() < 2:
        return None
    kept = np.arange(len(embedded)) != place
    fitted = fit_prototypes(embedded[kept], support.labels[kept], len(support.classes), support.fit)
    chances = softmax(-scale * (2.0 - 2.0 * fitted @ query))
    best = int(chances.argmax())
    return support.classes[best], float(chances[best])


def _relevance(
    classifier: FewShotClassifier, tile: TileInput, context: Context, place: int
) -> Float:
    """Cover each part of the tile in turn.

    Foundation encoders go on seeing the whole tile.

    Source: Zeiler and Fergus 2014, section 4.2.
    """
    covered = covered_tiles(tile.array)
    images = {key: image[None] for key, image in tile.images.items()}
    said = classifier.hear(images, 1)
    whole, _ = classifier.classify(tile.array[None], context, said)
    parts = []
    for start in range(0, len(covered), classifier.batch_size):
        batch = covered[start : start + classifier.batch_size]
        features = None if said is None else np.repeat(said, len(batch), axis=0)
        parts.append(classifier.classify(batch, context, features)[0][:, place])
    left: Float = np.concatenate(parts).reshape(GRID, GRID).astype(np.float32)
    return np.float32(whole[0, place]) - left


def covered_tiles(tile: NDArray[Any]) -> NDArray[Any]:
    """Copies of a tile `(M, S, S)`, `(GRID * GRID, M, S, S)`, each with one part covered."""
    size = tile.shape[-1]
    mean = tile.mean(axis=(1, 2)).astype(tile.dtype)[:, None, None]
    copies = np.repeat(tile[None], GRID * GRID, axis=0)
    half = COVERED * size / GRID / 2
    for row in range(GRID):
        for column in range(GRID):
            middle = (np.array([row, column]) + 0.5) * size / GRID
            top, left = np.maximum(0, np.round(middle - half)).astype(int)
            bottom, right = np.round(middle + half).astype(int)
            copies[row * GRID + column, :, top:bottom, left:right] = mean
    return copies
