"""Class prototypes: the support set as the bundle keeps it, and the numpy around it.

What is kept is not the class means but each support tile's tokens, for they depend on the CT. Where
training paired CT and tiles, a support tile passes the bridge with its own patient's CT, as in the
evaluation; else support and query share their context, and the means are computed anew for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.adaptation import Adaptation
from cdt_runtime.errors import PrototypeError

Float = NDArray[np.float32]
TENSORS = "prototypes.safetensors"
FACTS = "prototypes.json"

ONE_SHOT_SHRINKAGE = 0.9
"""Share of a class's offset that `shrunk_means` keeps where no class has a second tile."""

LEAST_SHRINKAGE = 0.2
"""Share of it that is kept at the least: no class may vanish in the mean of all."""

REGULARISERS = (0.3, 1.0, 3.0)
"""What `ridge_weights` chooses from. The kernel's diagonal is about 1, and so few tiles choose
badly between values that lie further apart."""

ONE_SHOT_REGULARISER = 1.0
"""What it takes where a class has one tile, so that none can be left out to choose by."""


@dataclass(frozen=True, eq=False)
class Prototypes:
    """A support set, ready for the bridge.

    Attributes:
        classes: the K class names.
        labels: `(S,)` int64, the class of each support tile.
        tokens: `(S, N, C)` float32, as the path encoder gives them.
        support_sha256: hash of each support tile's file or array.
        encoder_sha256: identity of the encoder, bridge and preprocessing that made the tokens.
        scale: factor of the negative squared distance in the logits; calibration is in it.
        scale_with_ct: the same where the answer rests on a CT.
        min_confidence: below this probability the answer is an abstention.
        fit: how the support becomes prototypes, a key of `FITS`: that of the evaluation.
        ct_context: whether the validation tiles spoke for a CT; if not, the answer is without.
        ct_gain: their gain in accuracy from it, `mean`, half-width `ci95` and `low`, the lower end
            of its interval over patients; None where training had no CT.
        calibration: how `scale` was fitted, with `learnt_scale` and, for each K, `temperatures` and
            `temperatures_with_ct`: the scale for another K is the one over the other.
        ct_tokens: `(P, T, C)` float32, of the support patients' CT where training paired CT and
            tiles; else None.
        ct_of: `(S,)` int64, which of them is each support tile's; -1 for none.
        statistics: `(E, F)` float32, `tile_statistics` of the tiles that were enrolled on the
            device: what is like them is known, too. None where there are none.
        statistics_of: `(E,)` int64, the place of each in the support.
        held_out: probability, without CT, that these prototypes give to the class of each tile of
            the test fold; none once the support has changed.
        adaptation: what brings a site's tiles to the stain of training; None for nothing.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    tokens: Float
    support_sha256: tuple[str, ...]
    encoder_sha256: str
    scale: float
    scale_with_ct: float
    min_confidence: float
    fit: str
    ct_context: bool
    ct_gain: Mapping[str, float] | None
    calibration: Mapping[str, Any]
    ct_tokens: Float | None = None
    ct_of: NDArray[np.int64] | None = None
    statistics: Float | None = None
    statistics_of: NDArray[np.int64] | None = None
    held_out: tuple[float, ...] = ()
    adaptation: Adaptation | None = None

    @property
    def ct_off(self) -> str | None:
        """Why the answer does not rest on a CT, in one line; None where it does."""
        if self.ct_context:
            return None
        if self.ct_gain is None:
            return "CT context is off: there was no CT in training"
        if self.ct_gain["low"] > 0:
            return "CT context is off: in training CT and tiles were of different patients"
        mean, half = (100 * self.ct_gain[name] for name in ("mean", "ci95"))
        return (
            f"CT context is off: validation showed no gain from it "
            f"({mean:+.1f} ± {half:.1f} points)"
        )

    def counts(self) -> dict[str, int]:
        """Return the number of support tiles of each class."""
        found = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, found.tolist(), strict=True))

    def to_files(self) -> dict[str, bytes]:
        """Return the two files that a bundle keeps."""
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {
            "labels": self.labels,
            "tokens": np.ascontiguousarray(self.tokens),
        }
        if self.ct_tokens is not None and self.ct_of is not None:
            tensors |= {"ct_tokens": np.ascontiguousarray(self.ct_tokens), "ct_of": self.ct_of}
        if self.statistics is not None and self.statistics_of is not None:
            tensors |= {
                "statistics": np.ascontiguousarray(self.statistics),
                "statistics_of": self.statistics_of,
            }
        facts = {
            "classes": self.classes,
            "support_sha256": self.support_sha256,
            "encoder_sha256": self.encoder_sha256,
            "scale": self.scale,
            "scale_with_ct": self.scale_with_ct,
            "min_confidence": self.min_confidence,
            "fit": self.fit,
            "ct_context": self.ct_context,
            "ct_gain": self.ct_gain,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "adaptation": self.adaptation.to_dict() if self.adaptation else None,
        }
        return {TENSORS: save(tensors), FACTS: json.dumps(facts, indent=1).encode()}

    @classmethod
    def from_files(cls, tensors: bytes, facts: bytes, *, encoder_sha256: str) -> Prototypes:
        """Read back what `to_files` gave.

        Args:
            tensors: content of `prototypes.safetensors`.
            facts: content of `prototypes.json`.
            encoder_sha256: identity of the encoder that will embed the queries.

        Raises:
            PrototypeError: they were made by another encoder, or do not fit together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays, values = load(tensors), json.loads(facts)
            made = cls(
                classes=tuple(values["classes"]),
                labels=arrays["labels"],
                tokens=arrays["tokens"],
                support_sha256=tuple(values["support_sha256"]),
                encoder_sha256=values["encoder_sha256"],
                scale=float(values["scale"]),
                scale_with_ct=float(values["scale_with_ct"]),
                min_confidence=float(values["min_confidence"]),
                fit=str(values["fit"]),
                ct_context=bool(values["ct_context"]),
                ct_gain=_gain(values["ct_gain"]),
                calibration=values["calibration"],
                ct_tokens=arrays.get("ct_tokens"),
                ct_of=arrays.get("ct_of"),
                statistics=arrays.get("statistics"),
                statistics_of=arrays.get("statistics_of"),
                held_out=tuple(map(float, values["held_out"])),
                adaptation=_adaptation(values["adaptation"]),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PrototypeError(f"prototypes can't be read ({error}): export again") from error
        if made.encoder_sha256 != encoder_sha256:
            raise PrototypeError(
                f"prototypes were made by encoder {made.encoder_sha256[:12]}, this bundle holds "
                f"{encoder_sha256[:12]}: export again, or fit them anew"
            )
        made.check()
        return made

    def check(self) -> None:
        """Make sure that the parts fit together.

        Raises:
            PrototypeError: naming the first that does not.
        """
        kinds, labels, tokens = len(self.classes), self.labels, self.tokens
        if not len(labels) == len(tokens) == len(self.support_sha256):
            raise PrototypeError("prototypes: labels, tokens and hashes differ in number")
        if labels.dtype != np.int64 or set(labels.tolist()) != set(range(kinds)) or kinds < 2:
            raise PrototypeError(f"prototypes: labels do not number the {kinds} classes")
        if tokens.ndim != 3 or tokens.dtype != np.float32 or not np.isfinite(tokens).all():
            raise PrototypeError("prototypes: tokens are not finite float32 of shape (S, N, C)")
        scales = (self.scale, self.scale_with_ct)
        in_range = all(0 < scale < float("inf") for scale in scales)
        if not (in_range and 0 <= self.min_confidence <= 1):
            raise PrototypeError(
                f"prototypes: scale {scales[0]}, {scales[1]} or min_confidence "
                f"{self.min_confidence} is out of range: export again"
            )
        if not all(0 <= chance <= 1 for chance in self.held_out):
            raise PrototypeError("prototypes: a held-out probability is out of range: export again")
        if self.ct_tokens is not None or self.ct_of is not None:
            self._check_ct(self.ct_tokens, self.ct_of)
        if self.statistics is not None or self.statistics_of is not None:
            self._check_statistics(self.statistics, self.statistics_of)
        if self.fit not in FITS:
            raise PrototypeError(
                f"prototypes: fit {self.fit!r}: expected one of {', '.join(FITS)}: export again"
            )

    def _check_ct(self, tokens: Float | None, of: NDArray[np.int64] | None) -> None:
        if tokens is None or tokens.ndim != 3 or not np.isfinite(tokens).all():
            raise PrototypeError("prototypes: CT tokens are not finite float32 of shape (P, T, C)")
        if (
            of is None
            or of.shape != self.labels.shape
            or not ((of >= -1) & (of < len(tokens))).all()
        ):
            raise PrototypeError(f"prototypes: support tiles do not number the {len(tokens)} CT")

    def _check_statistics(self, found: Float | None, of: NDArray[np.int64] | None) -> None:
        if found is None or found.ndim != 2 or not np.isfinite(found).all():
            raise PrototypeError("prototypes: statistics are not finite float32 of shape (E, F)")
        places = range(len(self.labels))
        if of is None or of.shape != (len(found),) or not set(of.tolist()) <= set(places):
            raise PrototypeError("prototypes: statistics do not number the support tiles")


def _adaptation(stored: Mapping[str, Any] | None) -> Adaptation | None:
    return None if stored is None else Adaptation.from_dict(stored)


def _gain(stored: Mapping[str, Any] | None) -> dict[str, float] | None:
    if stored is None:
        return None
    return {name: float(stored[name]) for name in ("mean", "ci95", "low")}


def encode_labels(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Turn label names into sorted class names and indices.

    Raises:
        PrototypeError: fewer than two classes.
    """
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise PrototypeError(
            f"support set has {len(classes)} class(es) {list(classes)}, expected at least 2"
        )
    index = {name: position for position, name in enumerate(classes)}
    return classes, np.array([index[label] for label in labels], dtype=np.int64)


def class_means(embeddings: Float, labels: NDArray[np.int64], n_classes: int) -> Float:
    """Mean embedding of each class, brought back to unit length.

    Args:
        embeddings: `(S, E)` unit vectors.
        labels: `(S,)` class indices.
        n_classes: K.

    Returns:
        `(K, E)` float32 unit vectors.

    Raises:
        PrototypeError: a class has no tile, or its embeddings cancel out.

    Source: Snell et al. 2017, eq. 1, on the unit sphere.
    """
    one_hot, counts = _one_hot(labels, n_classes)
    return _unit_rows((one_hot.T @ embeddings) / counts[:, None])


def shrunk_means(embeddings: Float, labels: NDArray[np.int64], n_classes: int) -> Float:
    """Class means, drawn towards the mean of all classes as far as their tiles disagree.

    A class keeps the share `t / (t + s / n)` of its offset from the mean of the class means: `t` is
    the variance between classes, `s` that within them and `n` the class's number of tiles. So a
    class of few, scattered tiles moves most. `ONE_SHOT_SHRINKAGE` where no class has two tiles.

    Args, returns, raises: as `class_means`.

    Source: James and Stein 1961, in the empirical-Bayes form of Efron and Morris 1973.
    """
    one_hot, counts = _one_hot(labels, n_classes)
    means = (one_hot.T @ embeddings) / counts[:, None]
    offsets = means - means.mean(axis=0)
    kept = _kept_shares(embeddings - means[labels], offsets, counts)
    return _unit_rows(means - (1.0 - kept[:, None]) * offsets)


def ridge_weights(embeddings: Float, labels: NDArray[np.int64], n_classes: int) -> Float:
    """Ridge regression from embeddings to centred one-hot labels; a class's weights are its row.

    Every class has the same weight, whatever its number of tiles. Solved in its dual form, a matrix
    of S x S. The regulariser is that of `REGULARISERS` with the least squared error when each tile
    is left out in turn, which has a closed form; `ONE_SHOT_REGULARISER` where a class has one tile.

    Args, returns, raises: as `class_means`. Rows are brought to unit length, so that logits and
    distances keep their range; the directions are those of the regression.

    Source: Bertinetto et al. 2019 (R2-D2); leaving out in closed form: Allen 1974 (PRESS).
    """
    one_hot, counts = _one_hot(labels, n_classes)
    weight = np.sqrt(len(labels) / (n_classes * counts))[labels][:, None]
    inputs = weight * embeddings.astype(np.float64)
    targets = weight * (one_hot - 1.0 / n_classes)
    values, vectors = np.linalg.eigh(inputs @ inputs.T)
    turned = vectors.T @ targets
    chosen = ONE_SHOT_REGULARISER
    if counts.min() >= 2:
        errors = [_left_out_error(values, vectors, turned, r) for r in REGULARISERS]
        chosen = REGULARISERS[int(np.argmin(errors))]
    dual = vectors @ (turned / (np.maximum(values, 0.0) + chosen)[:, None])
    return _unit_rows(dual.T @ inputs)


FITS: dict[str, Callable[[Float, NDArray[np.int64], int], Float]] = {
    "mean": class_means,
    "shrunk": shrunk_means,
    "ridge": ridge_weights,
}


def fit_prototypes(
    embeddings: Float, labels: NDArray[np.int64], n_classes: int, method: str = "mean"
) -> Float:
    """Turn a support set into one unit vector a class; logits are `-scale * (2 - 2 e.p)`.

    Args:
        embeddings: `(S, E)` unit vectors.
        labels: `(S,)` class indices.
        n_classes: K.
        method: a key of `FITS`.

    Returns:
        `(K, E)` float32 unit vectors.

    Raises:
        PrototypeError: no such method, a class has no tile, or its embeddings cancel out.
    """
    if method not in FITS:
        raise PrototypeError(f"fit {method!r}: expected one of {', '.join(FITS)}")
    return FITS[method](embeddings, labels, n_classes)


def _one_hot(
    labels: NDArray[np.int64], n_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Labels as `(S, K)` zeros and ones, and the `(K,)` number of tiles of each class.

    Raises:
        PrototypeError: a class has no tile.
    """
    one_hot = np.eye(n_classes, dtype=np.float32)[labels]
    counts = one_hot.sum(axis=0)
    if (counts == 0).any():
        raise PrototypeError(f"class {int(np.argmin(counts))} has no support tile")
    return one_hot, counts


def _unit_rows(rows: NDArray[Any]) -> Float:
    """Bring each class's vector to unit length.

    Raises:
        PrototypeError: one has no length.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms < 1e-6).any():
        raise PrototypeError("a class's support embeddings cancel out: check its tiles")
    result: Float = (rows / norms).astype(np.float32)
    return result


def _kept_shares(
    scatter: NDArray[np.float32], offsets: NDArray[np.float32], counts: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Share of each class's offset that `shrunk_means` keeps, `(K,)`."""
    freedom = len(scatter) - len(counts)
    if freedom == 0:
        return np.full(len(counts), ONE_SHOT_SHRINKAGE, dtype=np.float32)
    noise = np.square(scatter).sum() / freedom / counts
    between = np.square(offsets).sum() / (len(counts) - 1) - noise.mean()
    kept = max(between, 0.0) / np.maximum(max(between, 0.0) + noise, 1e-12)
    result: NDArray[np.float32] = np.maximum(kept, LEAST_SHRINKAGE).astype(np.float32)
    return result


def _left_out_error(
    values: NDArray[np.float64],
    vectors: NDArray[np.float64],
    turned: NDArray[np.float64],
    regulariser: float,
) -> float:
    """Squared error, by weight, of a ridge regression on each tile when that tile is left out.

    Args:
        values: eigenvalues of the kernel.
        vectors: its eigenvectors.
        turned: targets in the eigenvectors' frame.
        regulariser: added to the kernel's diagonal.
    """
    shrunk = 1.0 / (np.maximum(values, 0.0) + regulariser)
    dual = vectors @ (shrunk[:, None] * turned)
    diagonal = np.square(vectors) @ shrunk
    return float(np.square(dual / diagonal[:, None]).sum())


UNLABELLED = 0.3
"""What an unlabelled tile counts for in `transduced`, where a support tile counts for 1."""

SHARPER = 3.0
"""Factor of the logits there: a tile between classes should pull at none."""

TRANSDUCTIONS = 3
"""Times that `transduced` assigns the tiles anew."""


def transduced(
    prototypes: Float,
    support: Float,
    labels: NDArray[np.int64],
    unlabelled: Float,
    scale: float,
) -> Float:
    """Draw prototypes towards unlabelled tiles, each towards those that are likely its own.

    It takes the classes to be about equally frequent among the unlabelled tiles: where they are
    not, the rare ones are drawn into the frequent ones.

    Args:
        prototypes: `(K, E)` unit vectors, to begin with.
        support: `(S, E)` unit vectors.
        labels: `(S,)` class indices.
        unlabelled: `(n, E)` unit vectors.
        scale: factor of the negative squared distance in the logits.

    Returns:
        `(K, E)` float32 unit vectors.

    Source: Ren et al. 2018, soft k-means.
    """
    one_hot, _ = _one_hot(labels, len(prototypes))
    sums = one_hot.T @ support
    drawn = prototypes
    for _ in range(TRANSDUCTIONS):
        squared = 2.0 - 2.0 * unlabelled @ drawn.T
        shares = softmax(-SHARPER * scale * squared)
        drawn = _unit_rows(sums + UNLABELLED * shares.T @ unlabelled)
    return drawn


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Turn logits `(..., K)` into probabilities that sum to 1 over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    result: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
