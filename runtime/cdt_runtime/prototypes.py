"""Class prototypes: the support set as the bundle keeps it, and the numpy around it.

What is kept is not the class means but each support tile's tokens: support and query always pass
the bridge in the same CT context, so the means are computed anew for each context.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import PrototypeError

Float = NDArray[np.float32]
TENSORS = "prototypes.safetensors"
FACTS = "prototypes.json"


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
        min_confidence: below this probability the answer is an abstention.
        calibration: how `scale` was fitted, in words and numbers.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    tokens: Float
    support_sha256: tuple[str, ...]
    encoder_sha256: str
    scale: float
    min_confidence: float
    calibration: Mapping[str, Any]

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
        facts = {
            "classes": self.classes,
            "support_sha256": self.support_sha256,
            "encoder_sha256": self.encoder_sha256,
            "scale": self.scale,
            "min_confidence": self.min_confidence,
            "calibration": self.calibration,
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
                min_confidence=float(values["min_confidence"]),
                calibration=values["calibration"],
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
        if not (0 < self.scale < float("inf") and 0 <= self.min_confidence <= 1):
            raise PrototypeError(
                f"prototypes: scale {self.scale} or min_confidence {self.min_confidence} is out of "
                f"range: export again"
            )


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
    one_hot = np.eye(n_classes, dtype=np.float32)[labels]
    counts = one_hot.sum(axis=0)
    if (counts == 0).any():
        raise PrototypeError(f"class {int(np.argmin(counts))} has no support tile")
    means = (one_hot.T @ embeddings) / counts[:, None]
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if (norms < 1e-6).any():
        raise PrototypeError("a class's support embeddings cancel out: check its tiles")
    result: Float = (means / norms).astype(np.float32)
    return result


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Turn logits `(..., K)` into probabilities that sum to 1 over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    result: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
