from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cdt_runtime.errors import PrototypeError
from cdt_runtime.prototypes import (
    FACTS,
    TENSORS,
    Prototypes,
    class_means,
    encode_labels,
    softmax,
)

SUPPORT = Prototypes(
    classes=("front", "stroma"),
    labels=np.array([0, 1, 1]),
    tokens=np.arange(24, dtype=np.float32).reshape(3, 2, 4),
    support_sha256=("a", "b", "c"),
    encoder_sha256="e" * 64,
    scale=3.5,
    min_confidence=0.6,
    calibration={"k_shot": 1},
)


def test_prototypes_survive_their_files() -> None:
    files = SUPPORT.to_files()
    read = Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="e" * 64)
    assert np.array_equal(read.tokens, SUPPORT.tokens)
    assert np.array_equal(read.labels, SUPPORT.labels)
    assert replace(read, tokens=SUPPORT.tokens, labels=SUPPORT.labels).__dict__ == SUPPORT.__dict__
    assert read.counts() == {"front": 1, "stroma": 2}


def test_prototypes_of_another_encoder_are_refused() -> None:
    files = SUPPORT.to_files()
    with pytest.raises(PrototypeError, match="made by encoder eeeeeeeeeeee, this bundle holds fff"):
        Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="f" * 64)


@pytest.mark.parametrize(("tensors", "facts"), [(b"junk", b"{}"), (b"", b"{"), (b"junk", b"junk")])
def test_damaged_prototypes_are_refused(tensors: bytes, facts: bytes) -> None:
    with pytest.raises(PrototypeError, match=r"prototypes can't be read .*: export again"):
        Prototypes.from_files(tensors, facts, encoder_sha256="e" * 64)


def test_numbers_that_do_not_fit_are_refused() -> None:
    files = replace(SUPPORT, support_sha256=("a",)).to_files()
    with pytest.raises(PrototypeError, match="labels, tokens and hashes differ in number"):
        Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="e" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 5, 1])}, "labels do not number the 2 classes"),
        ({"labels": np.array([0, 0, 0])}, "labels do not number the 2 classes"),
        ({"tokens": SUPPORT.tokens * np.nan}, "tokens are not finite float32 of shape"),
        ({"tokens": SUPPORT.tokens[:, 0]}, "tokens are not finite float32 of shape"),
        ({"scale": float("nan")}, "scale nan or min_confidence 0.6 is out of range"),
        ({"min_confidence": 1.5}, "scale 3.5 or min_confidence 1.5 is out of range"),
    ],
)
def test_prototypes_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    files = replace(SUPPORT, **change).to_files()  # type: ignore[arg-type]
    with pytest.raises(PrototypeError, match=message):
        Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="e" * 64)


def test_class_means_are_unit_vectors_of_their_class() -> None:
    embeddings = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    means = class_means(embeddings, np.array([0, 1, 1]), 2)
    assert np.allclose(np.linalg.norm(means, axis=1), 1)
    assert np.allclose(means[0], [1, 0])
    assert np.allclose(means[1], np.array([0.3, 0.9]) / np.hypot(0.3, 0.9))


def test_a_class_without_tiles_is_refused() -> None:
    with pytest.raises(PrototypeError, match="class 1 has no support tile"):
        class_means(np.eye(2, dtype=np.float32), np.array([0, 0]), 2)


def test_embeddings_that_cancel_out_are_refused() -> None:
    opposite = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    with pytest.raises(PrototypeError, match="support embeddings cancel out"):
        class_means(opposite, np.array([0, 0, 1]), 2)


def test_labels_are_numbered_in_order_of_their_names() -> None:
    classes, indices = encode_labels(["stroma", "front", "stroma"])
    assert classes == ("front", "stroma")
    assert indices.tolist() == [1, 0, 1]
    with pytest.raises(PrototypeError, match=r"support set has 1 class\(es\) \['stroma'\]"):
        encode_labels(["stroma"])


def test_softmax_sums_to_one_for_huge_logits() -> None:
    chances = softmax(np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]))
    assert np.allclose(chances.sum(axis=1), 1)
    assert np.allclose(chances[1], 1 / 3)
