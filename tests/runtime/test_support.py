"""Support sets changed, and what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cdt_runtime.errors import PrototypeError
from cdt_runtime.prototypes import Prototypes
from cdt_runtime.review import MAX_FOLDS, review
from cdt_runtime.support import NewTiles, added, class_name, without_class

CALIBRATION = {
    "learnt_scale": 6.0,
    "temperatures": {"1": 3.0, "3": 2.0, "5": 1.5},
    "temperatures_with_ct": {"1": 6.0, "3": 4.0},
}


def a_support(per_class: int = 5, classes: tuple[str, ...] = ("a", "b")) -> Prototypes:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(classes)), per_class)
    return Prototypes(
        classes=classes,
        labels=labels,
        tokens=rng.normal(size=(len(labels), 3, 8)).astype(np.float32),
        support_sha256=tuple(f"{place:064x}" for place in range(len(labels))),
        encoder_sha256="e" * 64,
        scale=4.0,
        scale_with_ct=1.5,
        min_confidence=0.6,
        fit="mean",
        ct_context=False,
        ct_gain=None,
        calibration=CALIBRATION,
    )


def new_tiles(*labels: str, first: int = 100, ct: bool = False) -> NewTiles:
    rng = np.random.default_rng(1)
    count = len(labels)
    return NewTiles(
        names=tuple(f"tile{place}.png" for place in range(count)),
        labels=labels,
        sha256=tuple(f"{first + place:064x}" for place in range(count)),
        tokens=rng.normal(size=(count, 3, 8)).astype(np.float32),
        statistics=np.full((count, 2), first, np.float32) + np.arange(count)[:, None],
        ct_tokens=np.ones((4, 8), np.float32) if ct else None,
    )


def test_a_class_is_added_and_taken_out_again() -> None:
    support = a_support()
    grown = added(support, new_tiles("new", "new", "a"))
    grown.check()
    assert grown.classes == ("a", "b", "new")
    assert grown.counts() == {"a": 6, "b": 5, "new": 2}
    assert np.array_equal(grown.tokens[:10], support.tokens)
    back = without_class(grown, "new")
    back.check()
    assert back.counts() == {"a": 6, "b": 5}
    other = without_class(grown, "a")
    assert other.classes == ("b", "new")
    assert other.labels.tolist() == [0] * 5 + [1] * 2
    assert np.array_equal(other.tokens, grown.tokens[[5, 6, 7, 8, 9, 10, 11]])


def test_statistics_of_new_tiles_go_with_them() -> None:
    grown = added(a_support(), new_tiles("new", "a"))
    assert grown.statistics_of is not None
    assert grown.statistics_of.tolist() == [10, 11]
    again = added(grown, new_tiles("new", first=200))
    assert again.statistics is not None
    assert again.statistics[:, 0].tolist() == [100, 101, 200]
    back = without_class(again, "a")
    back.check()
    assert back.statistics is not None
    assert back.statistics_of is not None
    assert back.statistics[:, 0].tolist() == [100, 200]
    assert [back.classes[back.labels[place]] for place in back.statistics_of] == ["new", "new"]
    assert without_class(again, "new").statistics is not None
    assert without_class(added(a_support(), new_tiles("new")), "new").statistics is None


@pytest.mark.parametrize(("tiles", "scales"), [(1, (2.0, 1.0)), (4, (3.0, 1.5)), (9, (4.0, 1.5))])
def test_the_scale_is_that_for_the_smallest_class(tiles: int, scales: tuple[float, float]) -> None:
    grown = added(a_support(), new_tiles(*["new"] * tiles))
    expected = (4.0, 1.5) if tiles >= 5 else scales
    assert (grown.scale, grown.scale_with_ct) == expected


def test_support_tiles_keep_their_own_ct() -> None:
    own = replace(a_support(), ct_tokens=np.zeros((2, 4, 8), np.float32), ct_of=np.arange(10) % 2)
    grown = added(own, new_tiles("new", "a", ct=True))
    grown.check()
    assert grown.ct_of is not None
    assert grown.ct_tokens is not None
    assert grown.ct_of.tolist()[-2:] == [2, 2]
    assert grown.ct_tokens.shape == (3, 4, 8)
    alone = added(own, new_tiles("new"))
    assert alone.ct_of is not None
    assert alone.ct_of.tolist()[-1] == -1
    assert added(a_support(), new_tiles("new", ct=True)).ct_tokens is None


def test_a_tile_counts_once() -> None:
    with pytest.raises(PrototypeError, match=r"tile0.png: is a support tile of class 'b' already"):
        added(a_support(), new_tiles("new", first=7))
    twice = replace(new_tiles("x", "y"), sha256=("f" * 64, "f" * 64))
    with pytest.raises(PrototypeError, match=r"tile1.png: is a support tile of class 'x' already"):
        added(a_support(), twice)


@pytest.mark.parametrize("name", ["", "  ", "a\x1b[2J", "x" * 81])
def test_a_class_needs_a_name_that_can_be_shown(name: str) -> None:
    with pytest.raises(PrototypeError, match="expected a name of 1 to 80 letters"):
        class_name(name)


def test_what_can_not_be_taken_out_is_said() -> None:
    with pytest.raises(PrototypeError, match="class 'c': unknown: the classes are a, b"):
        without_class(a_support(), "c")
    with pytest.raises(PrototypeError, match="without it 1 would be left, expected at least 2"):
        without_class(a_support(), "a")
    assert class_name("  invasion \n front ") == "invasion front"


def clusters(counts: tuple[int, ...], spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(counts), 16))
    labels = np.repeat(np.arange(len(counts)), counts)
    found = centres[labels] + spread * rng.normal(size=(len(labels), 16))
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit.astype(np.float32), labels


def test_tiles_that_are_told_apart_say_so() -> None:
    embedded, labels = clusters((5, 5, 1), 0.1)
    found = review(embedded, embedded[:, None], labels, "abc", "mean", 10.0)
    assert (found.accuracy, found.tested) == (1.0, 10)  # the lone tile can't be left out
    assert (found.doubtful, found.close, found.copies) == ((), (), ())


def test_a_wrong_label_close_classes_and_copies_are_found() -> None:
    embedded, labels = clusters((6, 6), 0.1)
    swapped = labels.copy()
    swapped[3] = 1
    found = review(embedded, embedded[:, None], swapped, "ab", "mean", 10.0)
    (odd,) = found.doubtful
    assert (odd.place, odd.label, odd.nearest) == (3, "b", "a")
    assert odd.probability > 0.8
    mixed = np.array([0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1])  # a third of each is the other's
    found = review(embedded, embedded[:, None], mixed, "ab", "mean", 1.0)
    assert [(one.first, one.second) for one in found.close] == [("a", "b")]
    assert found.close[0].share == pytest.approx(1 / 3)
    copied = np.concatenate([embedded, embedded[2:3]])
    found = review(copied, copied[:, None], np.append(labels, 0), "ab", "mean", 1.0)
    assert found.copies == ((2, 12),)


def test_many_tiles_are_left_out_in_groups() -> None:
    embedded, labels = clusters((60, 40, 2), 0.1)
    found = review(embedded, embedded[:, None], labels, "abc", "ridge", 10.0)
    assert found.tested > 2 * MAX_FOLDS - 2
    assert found.accuracy is not None
    assert found.accuracy > 0.95


def test_lone_tiles_say_nothing() -> None:
    embedded, labels = clusters((1, 1), 0.1)
    assert review(embedded, embedded[:, None], labels, "ab", "mean", 10.0).accuracy is None
