from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from cdt_train.supervised_metrics import (
    METRICS,
    macro_auc,
    resampled,
    supervised_metrics,
    with_intervals,
)


def random_case(classes: int, count: int = 200) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)).round(1) + 1.5 * np.eye(classes)[truth]
    chances = np.exp(logits)
    return chances / chances.sum(axis=1, keepdims=True), truth


@pytest.mark.parametrize(("task", "classes"), [("binary", 2), ("multiclass", 4)])
def test_every_figure_is_that_of_scikit_learn(task: Any, classes: int) -> None:
    chances, truth = random_case(classes)
    predicted = chances.argmax(axis=1)
    ranked = chances[:, 1] if classes == 2 else chances
    expected = {
        "auc": sk.roc_auc_score(truth, ranked, multi_class="ovr"),
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, average="macro"),
        "cohen_kappa": sk.cohen_kappa_score(truth, predicted),
        "mcc": sk.matthews_corrcoef(truth, predicted),
    }
    found = supervised_metrics(chances, truth, task)
    assert tuple(found) == METRICS
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert 0 < found["ece"] < 0.5


def test_labels_are_judged_one_by_one() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((100, 3)) < 0.4).astype(np.float32)
    chances = np.clip(0.3 * rng.random((100, 3)) + 0.6 * truth * rng.random((100, 3)), 0, 1)
    found = supervised_metrics(chances, truth, "multilabel")
    assert found["auc"] == pytest.approx(sk.roc_auc_score(truth, chances))
    assert found["accuracy"] == pytest.approx(((chances > 0.5) == truth).mean())
    f1 = [
        sk.f1_score(truth[:, k], chances[:, k] > 0.5, average="macro", zero_division=0)
        for k in range(3)
    ]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))


def test_a_class_that_is_missing_is_left_out_of_the_auc() -> None:
    chances, truth = random_case(3)
    some = truth < 2
    expected = [
        sk.roc_auc_score(truth[some] == k, chances[some, k]) for k in range(2)
    ]  # the third has no positive
    found = supervised_metrics(chances[some], truth[some], "multiclass")
    assert found["auc"] == pytest.approx(np.mean(expected))
    assert np.isnan(macro_auc(chances[:, :1], np.ones((len(chances), 1), dtype=bool)))


def test_what_the_data_do_not_define_is_none() -> None:
    chances = np.array([[0.2, 0.8], [0.3, 0.7]])
    truth = np.array([1, 1])
    found = with_intervals(
        lambda some: supervised_metrics(chances[some], truth[some], "binary"),
        np.arange(2),
        resamples=20,
    )
    assert found["auc"] == {"value": None, "low": None, "high": None}
    assert found["accuracy"]["value"] == 1


def test_groups_are_drawn_whole() -> None:
    groups = np.array(["b", "a", "b", "c", "a"])
    for chosen in resampled(groups, 50, seed=0):
        counts = np.bincount(chosen, minlength=5)
        assert counts[0] == counts[2]
        assert counts[1] == counts[4]
    first, again = (np.concatenate(list(resampled(groups, 5, seed=1))) for _ in range(2))
    assert first.tolist() == again.tolist()


def test_intervals_are_wider_where_groups_are_few() -> None:
    chances, truth = random_case(2, 400)

    def width(groups: NDArray[Any]) -> float:
        found = with_intervals(
            lambda some: supervised_metrics(chances[some], truth[some], "binary"),
            groups,
            resamples=200,
        )["accuracy"]
        assert found["low"] < found["value"] < found["high"]  # type: ignore[operator]
        return found["high"] - found["low"]  # type: ignore[operator]

    right = chances.argmax(axis=1) == truth
    alone = np.arange(400)
    clustered = np.empty(400, dtype=int)
    clustered[np.argsort(right, kind="stable")] = np.arange(400) // 20  # alike in a group
    assert 0.05 < width(alone) < 0.1
    assert width(clustered) > 2 * width(alone)
