"""What an answer rests on: support tiles, parts of the tile, and what else might have come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        slices: `(D,)`, by how much that probability falls when that slice of the CT input is
            covered by the CT's mean; None where the answer does not rest on a CT alone.
        ct: `(D, S, S)`, the first window of the CT input, -1 to 1; None likewise.
    """

    prediction: Prediction
    likeliest: str
    support: tuple[SupportTile, ...]
    relevance: Float
    tile: NDArray[Any]
    slices: Float | None = None
    ct: Float | None = None

    @property
    def changed_by_one(self) -> int:
        """Support tiles without any one of which another class would be the likeliest."""
        return sum(
            one.without is not None and one.without[0] != self.likeliest for one in self.support
        )


def find_evidence(
    classifier: FewShotClassifier,
    tile: TileInput,
    context: Context,
    read_ct: Callable[[], Float] | None = None,
) -> Evidence:
    """Ask what the answer to a tile rests on.

    Args:
        classifier: of the bundle.
        tile: as `FewShotClassifier.read` gives it.
        context: the CT's, or none.
        read_ct: reads the CT input `(1, W, D, S, S)`; asked where the answer rests on it.

    Raises:
        BackendError: the engine gave no answer.
    """
    (prediction,) = classifier.predict_each([tile], context)
    counted = classifier.context(None) if classifier.prototypes.ct_off else context
    chances = prediction.probabilities
    likeliest = max(chances, key=lambda name: chances[name])
    place = classifier.classes.index(likeliest)
    ct_input, slices = None, None
    if read_ct and counted.used and classifier.contexts.alone:
        ct_input = read_ct()
        slices = _slices(classifier, tile, counted, ct_input, place)
    return Evidence(
        prediction=prediction,
        likeliest=likeliest,
        support=_support(classifier, tile, counted),
        relevance=_relevance(classifier, tile, counted, place),
        tile=tile.array,
        slices=slices,
        ct=None if ct_input is None else ct_input[0, 0],
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


def _slices(
    classifier: FewShotClassifier, tile: TileInput, context: Context, ct_input: Float, place: int
) -> Float:
    """Cover each slice of the CT input in turn."""
    images = {key: image[None] for key, image in tile.images.items()}
    said = classifier.hear(images, 1)
    found = []
    for name, seen in [("whole", ct_input), *covered_slices(ct_input)]:
        there = classifier.contexts.of_input(seen, context, name)
        found.append(classifier.classify(tile.array[None], there, said)[0][0, place])
    return np.array(found[0] - np.array(found[1:]), np.float32)


def covered_slices(ct_input: Float) -> Iterator[tuple[str, Float]]:
    """Copies of a CT input `(1, W, D, S, S)`, each with a slice covered by its window's mean."""
    means = ct_input.mean(axis=(2, 3, 4))
    for number in range(ct_input.shape[2]):
        copy = ct_input.copy()
        copy[:, :, number] = means[..., None, None]
        yield f"without slice {number}", copy


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
