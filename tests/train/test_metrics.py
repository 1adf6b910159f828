from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from cdt_runtime.prototypes import softmax
from cdt_train.metrics import (
    brier_score,
    confusion_counts,
    curves,
    decision_metrics,
    expected_calibration_error,
    half_width,
    macro_auc,
    metrics,
    risk_coverage,
    roc_curve,
)
from cdt_train.scores import EpisodeScores


def scores(ways: int, count: int = 900, seed: int = 0) -> EpisodeScores:
    """Queries of unequal classes, classified better than chance."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(ways, count, p=np.arange(1, ways + 1) / np.arange(1, ways + 1).sum())
    logits = 1.5 * np.eye(ways)[truth] + rng.normal(size=(count, ways))
    right = (logits.argmax(axis=1) == truth).reshape(30, -1)
    return EpisodeScores(right.mean(axis=1), logits, truth, np.arange(count))


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_every_figure_is_that_of_scikit_learn(ways: int) -> None:
    given = scores(ways)
    chances, truth = softmax(given.logits / 1.7), given.truth
    found, predicted = metrics(given, 1.7), chances.argmax(axis=1)
    ranked = chances[:, 1] if ways == 2 else chances
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, average="macro"),
        "cohen_kappa": sk.cohen_kappa_score(truth, predicted),
        "mcc": sk.matthews_corrcoef(truth, predicted),
        "auc_roc": sk.roc_auc_score(truth, ranked, multi_class="ovr"),
        "nll": sk.log_loss(truth, chances),
        "brier": np.square(chances - np.eye(ways)[truth]).sum(axis=1).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["confusion"] == sk.confusion_matrix(truth, predicted).tolist()
    assert found["recall"] == pytest.approx(sk.recall_score(truth, predicted, average=None))
    assert found["episodes"] == 30
    assert found["queries"] == 900


def test_ties_count_half_in_the_area_under_the_curve() -> None:
    truth = np.array([0, 0, 1, 1])
    flat = np.full((4, 2), 0.5)
    assert macro_auc(flat, truth) == 0.5
    tied = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    assert macro_auc(tied, truth) == pytest.approx(0.875)


def test_figures_without_a_value_are_zero_and_not_nan() -> None:
    only_one = confusion_counts(np.zeros(4, np.int64), np.tile([0.9, 0.1], (4, 1)))
    found = decision_metrics(only_one)
    assert found == {"balanced_accuracy": 1.0, "macro_f1": 1.0, "cohen_kappa": 0.0, "mcc": 0.0}
    assert macro_auc(np.tile([0.9, 0.1], (4, 1)), np.zeros(4, np.int64)) == 0.5


def test_calibration_error_by_hand() -> None:
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert expected_calibration_error(chances, np.array([0, 1, 1, 1])) == pytest.approx(0.4)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_brier_score_by_hand() -> None:
    chances = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert brier_score(chances, np.array([0, 0])) == pytest.approx((0 + 0.5) / 2)
    assert brier_score(chances, np.array([1, 0])) == pytest.approx((2 + 0.5) / 2)


def test_risk_rises_with_coverage_where_doubt_is_right() -> None:
    chances = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    risks = risk_coverage(chances, np.array([0, 0, 0, 1]))
    assert risks.tolist() == [0, 0, 0, 0.25]
    logits = np.log(chances)
    found = metrics(EpisodeScores(np.array([0.75, 0.75]), logits, np.array([0, 0, 0, 1])))
    assert found["aurc"] == pytest.approx(0.0625)
    assert found["accuracy_at_80"] == 0.75  # 80 % of four queries are all four
    found = metrics(EpisodeScores(np.ones(2), np.repeat(logits, 5, axis=0), np.repeat([0, 1], 10)))
    assert found["accuracy_at_80"] == pytest.approx(10 / 16)


def test_the_order_of_equally_confident_queries_does_not_matter() -> None:
    chances = np.tile([0.8, 0.2], (4, 1))
    for truth in ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]):
        assert risk_coverage(chances, np.array(truth)) == pytest.approx([0.5] * 4)


def test_the_interval_over_episodes_is_the_standard_one() -> None:
    accuracies = np.array([0.8, 1.0, 0.6, 0.8])
    assert half_width(accuracies) == pytest.approx(1.96 * np.std(accuracies, ddof=1) / 2)
    assert half_width(accuracies[:1]) == 0.0


@pytest.mark.parametrize("ways", [2, 4])
def test_curves_are_compact_monotone_and_agree_with_the_figures(ways: int) -> None:
    given = scores(ways, 3000)
    drawn, found = curves(given, 1.3), metrics(given, 1.3)
    assert len(drawn["roc"]) == ways
    areas = []
    for curve in drawn["roc"]:
        x, y = np.array(curve["false_positive"]), np.array(curve["true_positive"])
        assert len(x) == len(y) <= 101
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= 0).all()
        areas.append(np.trapezoid(y, x))
    assert np.mean(areas) == pytest.approx(found["auc_roc"], abs=5e-3)
    risk = drawn["risk_coverage"]
    assert len(risk["risk"]) == len(risk["coverage"]) == 101
    assert risk["coverage"][-1] == 1
    assert risk["risk"][-1] == pytest.approx(1 - given.correct.mean(), abs=1e-5)
    bins = drawn["reliability"]
    gaps = np.abs(np.array(bins["confidence"]) - bins["accuracy"])
    assert sum(bins["count"]) == 3000
    assert gaps @ bins["count"] / 3000 == pytest.approx(found["ece"], abs=1e-4)
    assert len(json.dumps(drawn)) < 3500 * (ways + 1)
    json.dumps(found)


def test_a_perfect_roc_curve_goes_through_the_corner() -> None:
    curve = roc_curve(np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, True, False, False]))
    assert curve["true_positive"][:2] == [0, 1]
    assert curve["false_positive"][:2] == [0, 0]
