from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cdt_runtime import prototypes
from cdt_runtime.errors import PrototypeError
from cdt_runtime.prototypes import (
    FACTS,
    FITS,
    ONE_SHOT_SHRINKAGE,
    REGULARISERS,
    TENSORS,
    Prototypes,
    class_means,
    encode_labels,
    fit_prototypes,
    ridge_weights,
    shrunk_means,
    softmax,
)

SUPPORT = Prototypes(
    classes=("front", "stroma"),
    labels=np.array([0, 1, 1]),
    tokens=np.arange(24, dtype=np.float32).reshape(3, 2, 4),
    support_sha256=("a", "b", "c"),
    encoder_sha256="e" * 64,
    scale=3.5,
    scale_with_ct=4.5,
    min_confidence=0.6,
    fit="ridge",
    ct_context=False,
    ct_gain={"mean": 0.0012, "ci95": 0.0034, "low": -0.0022},
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


def test_paired_prototypes_keep_their_ct() -> None:
    tokens = np.ones((2, 3, 4), dtype=np.float32)
    files = replace(SUPPORT, ct_tokens=tokens, ct_of=np.array([0, -1, 1])).to_files()
    read = Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="e" * 64)
    assert read.ct_tokens is not None
    assert np.array_equal(read.ct_tokens, tokens)
    assert read.ct_of is not None
    assert read.ct_of.tolist() == [0, -1, 1]


@pytest.mark.parametrize("field", ["fit", "ct_context", "ct_gain", "scale", "calibration"])
def test_prototypes_that_lack_a_field_are_refused(field: str) -> None:
    files = SUPPORT.to_files()
    facts = {key: value for key, value in json.loads(files[FACTS]).items() if key != field}
    with pytest.raises(PrototypeError, match=f"prototypes can't be read \\('{field}'\\): exp"):
        Prototypes.from_files(files[TENSORS], json.dumps(facts).encode(), encoder_sha256="e" * 64)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ct_context": True}, None),
        ({}, "CT context is off: validation showed no gain from it (+0.1 ± 0.3 points)"),
        (
            {"ct_gain": {"mean": 0.02, "ci95": 0.01, "low": 0.01}},
            "CT context is off: in training CT and tiles were of different patients",
        ),
        ({"ct_gain": None}, "CT context is off: there was no CT in training"),
    ],
)
def test_they_say_why_the_ct_is_not_used(change: dict[str, object], line: str | None) -> None:
    support = replace(SUPPORT, **change)  # type: ignore[arg-type]
    files = support.to_files()
    read = Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256="e" * 64)
    assert read.ct_off == line


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
        ({"scale": float("nan")}, "scale nan, 4.5 or min_confidence 0.6 is out of range"),
        ({"scale_with_ct": 0.0}, "scale 3.5, 0.0 or min_confidence 0.6 is out of range"),
        (
            {"ct_tokens": np.ones((2, 3, 4), np.float32), "ct_of": np.array([0, 2, 1])},
            "support tiles do not number the 2 CT",
        ),
        (
            {"ct_tokens": np.ones((2, 3), np.float32), "ct_of": np.array([0, 1, 1])},
            r"CT tokens are not finite float32 of shape \(P, T, C\)",
        ),
        ({"fit": "median"}, "fit 'median': expected one of mean, shrunk, ridge: export again"),
        ({"min_confidence": 1.5}, "scale 3.5, 4.5 or min_confidence 1.5 is out of range"),
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


def cloud(counts: tuple[int, ...], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around one axis a class, with their labels."""
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng(seed).normal(size=(len(labels), 8))
    points = np.eye(len(counts), 8)[labels] + spread * noise
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize("counts", [(1, 1), (5, 5, 5), (7, 1, 3)])
def test_every_fit_gives_a_unit_vector_a_class_that_knows_its_own(
    method: str, counts: tuple[int, ...]
) -> None:
    support, labels = cloud(counts, 0.1)
    found = fit_prototypes(support, labels, len(counts), method)
    assert found.shape == (len(counts), 8)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    queries, truth = cloud((20,) * len(counts), 0.1, seed=1)
    assert ((queries @ found.T).argmax(axis=1) == truth).all()


@pytest.mark.parametrize("method", FITS)
def test_the_order_of_the_support_tiles_does_not_matter(method: str) -> None:
    support, labels = cloud((4, 4, 4), 0.5)
    turned = np.random.default_rng(0).permutation(len(labels))
    first = fit_prototypes(support, labels, 3, method)
    assert np.allclose(first, fit_prototypes(support[turned], labels[turned], 3, method), atol=1e-5)


def test_the_mean_is_the_fit_that_nobody_asks_for() -> None:
    support, labels = cloud((3, 3), 0.3)
    assert np.array_equal(fit_prototypes(support, labels, 2), class_means(support, labels, 2))


def test_an_unknown_fit_names_those_there_are() -> None:
    with pytest.raises(PrototypeError, match="fit 'svm': expected one of mean, shrunk, ridge"):
        fit_prototypes(np.eye(2, dtype=np.float32), np.array([0, 1]), 2, "svm")


@pytest.mark.parametrize("method", FITS)
def test_no_fit_takes_a_class_without_tiles(method: str) -> None:
    with pytest.raises(PrototypeError, match="class 1 has no support tile"):
        fit_prototypes(np.eye(2, dtype=np.float32), np.array([0, 0]), 2, method)


def offset_from_the_mean(fitted: np.ndarray, label: int, means: np.ndarray) -> float:
    """How far a prototype stands from the mean of all, against its plain class mean."""
    centre = means.mean(axis=0) / np.linalg.norm(means.mean(axis=0))
    angles = [np.arccos(row @ centre) for row in (fitted[label], means[label])]
    return float(angles[0] / angles[1])


def test_scattered_classes_and_rare_ones_are_shrunk_most() -> None:
    tight, labels = cloud((5, 5, 5), 0.02)
    plain = class_means(tight, labels, 3)
    assert np.allclose(shrunk_means(tight, labels, 3), plain, atol=1e-3)
    loose, labels = cloud((20, 20, 2), 0.4)
    plain, shrunk = class_means(loose, labels, 3), shrunk_means(loose, labels, 3)
    kept = [offset_from_the_mean(shrunk, label, plain) for label in range(3)]
    assert kept[2] < min(kept[0], kept[1]) < 1


def test_one_tile_a_class_is_shrunk_by_the_fixed_share() -> None:
    support = np.eye(2, dtype=np.float32)
    expected = np.array([[0.5, 0.5], [0.5, 0.5]]) + ONE_SHOT_SHRINKAGE * (support - 0.5)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(shrunk_means(support, np.array([0, 1]), 2), expected, atol=1e-6)


def test_ridge_is_the_regression_that_scikit_learn_finds() -> None:
    from sklearn.linear_model import Ridge

    support, labels = cloud((4, 4, 4), 0.6)
    targets = np.eye(3)[labels] - 1 / 3
    rows = [
        Ridge(alpha=alpha, fit_intercept=False).fit(support, targets).coef_
        for alpha in REGULARISERS
    ]
    cosines = [(ridge_weights(support, labels, 3) * row).sum(axis=1) for row in rows]
    lengths = [np.linalg.norm(row, axis=1) for row in rows]
    best = max(float((c / n).min()) for c, n in zip(cosines, lengths, strict=True))
    assert best == pytest.approx(1, abs=1e-5)


def test_leaving_out_in_closed_form_is_leaving_out() -> None:
    support, labels = cloud((3, 3), 0.6)
    inputs, targets = support.astype(np.float64), np.eye(2)[labels] - 0.5
    by_hand = 0.0
    for out in range(6):
        kept = np.arange(6) != out
        kernel = inputs[kept] @ inputs[kept].T + 0.3 * np.eye(5)
        dual = np.linalg.solve(kernel, targets[kept])
        by_hand += float(np.square(targets[out] - inputs[out] @ inputs[kept].T @ dual).sum())
    values, vectors = np.linalg.eigh(inputs @ inputs.T)
    found = prototypes._left_out_error(values, vectors, vectors.T @ targets, 0.3)
    assert found == pytest.approx(by_hand)


def test_ridge_sees_a_direction_that_means_drown() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 200)
    points = np.stack([0.3 * (2 * labels - 1.0), 3 * rng.normal(size=400)], axis=1)
    points = np.concatenate([points, 0.2 * rng.normal(size=(400, 3))], axis=1)
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    support = (points[:40], labels[:40], 2)
    right = [
        float(((points[40:] @ fit.T).argmax(axis=1) == labels[40:]).mean())
        for fit in (ridge_weights(*support), class_means(*support))
    ]
    assert right[0] > right[1] + 0.05


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
