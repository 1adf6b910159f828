"""Metrics of one fold, from the scores of its episodes, and the curves that pictures draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.prototypes import softmax
from cdt_train.scores import Doubles, EpisodeScores, Ints, negative_log_likelihood

BINS = 15
"""Of confidence, for the calibration error and the reliability diagram."""

POINTS = 101
"""Of a stored curve, at most."""

COVERAGE = 0.8
"""Share of the queries that `accuracy_at_80` answers."""


def metrics(scores: EpisodeScores, temperature: float = 1.0) -> dict[str, Any]:
    """Compute every metric of one fold.

    `accuracy` is the mean over episodes and `accuracy_ci95` its half-width over episodes; the other
    figures are over all queries of all episodes. `recall` and the rows of `confusion` (true class)
    and its columns (predicted class) follow the episode's classes.

    Args:
        scores: of episodes with the same classes.
        temperature: divides the logits before they become probabilities.
    """
    chances = softmax(scores.logits / temperature)
    confusion = confusion_counts(scores.truth, chances)
    risks = risk_coverage(chances, scores.truth)
    return {
        "episodes": len(scores.accuracies),
        "queries": len(scores.truth),
        "accuracy": scores.accuracy,
        "accuracy_ci95": half_width(scores.accuracies),
        **decision_metrics(confusion),
        "auc_roc": macro_auc(chances, scores.truth),
        "ece": expected_calibration_error(chances, scores.truth),
        "brier": brier_score(chances, scores.truth),
        "nll": negative_log_likelihood(scores.logits / temperature, scores.truth),
        "aurc": float(risks.mean()),
        "accuracy_at_80": float(1.0 - risks[math.ceil(COVERAGE * len(risks)) - 1]),
        "recall": _recalls(confusion).tolist(),
        "confusion": confusion.tolist(),
    }


def curves(scores: EpisodeScores, temperature: float = 1.0) -> dict[str, Any]:
    """Compute what the pictures draw, each curve in at most `POINTS` points.

    Returns:
        `roc`: for each class `false_positive` and `true_positive` rates. `risk_coverage`:
        `coverage` and `risk`. `reliability`: `confidence`, `accuracy` and `count` of each bin that
        holds a query.
    """
    chances = softmax(scores.logits / temperature)
    risks = risk_coverage(chances, scores.truth)
    kept = np.unique(np.linspace(0, len(risks) - 1, POINTS).round().astype(int))
    return {
        "roc": [
            roc_curve(chances[:, label], scores.truth == label) for label in range(chances.shape[1])
        ],
        "risk_coverage": {
            "coverage": _rounded((kept + 1) / len(risks)),
            "risk": _rounded(risks[kept]),
        },
        "reliability": reliability(chances, scores.truth),
    }


def half_width(values: Doubles) -> float:
    """Half-width of the normal 95 % interval of a mean over episodes; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def confusion_counts(truth: Ints, chances: Doubles) -> Ints:
    """Count queries by true class (row) and predicted class (column)."""
    ways = chances.shape[1]
    cells = truth * ways + chances.argmax(axis=1)
    return np.bincount(cells, minlength=ways * ways).reshape(ways, ways)


def decision_metrics(confusion: Ints) -> dict[str, float]:
    """Balanced accuracy, macro F1, Cohen's kappa and Matthews' coefficient of a confusion matrix.

    Where a figure has no value, because only one class occurs, it is 0.

    Source: Cohen 1960; Gorodkin 2004 for more than two classes.
    """
    counts = confusion.astype(np.float64)
    total, hits = counts.sum(), np.diag(counts)
    true, found = counts.sum(axis=1), counts.sum(axis=0)
    occurs = true + found > 0
    by_chance = float(true @ found)
    spread = math.sqrt((total**2 - found @ found) * (total**2 - true @ true))
    return {
        "balanced_accuracy": float(_recalls(confusion)[true > 0].mean()),
        "macro_f1": float((2 * hits[occurs] / (true + found)[occurs]).mean()),
        "cohen_kappa": _ratio(total * hits.sum() - by_chance, total**2 - by_chance),
        "mcc": _ratio(total * hits.sum() - by_chance, spread),
    }


def macro_auc(chances: Doubles, truth: Ints) -> float:
    """Area under the ROC curve, each class against the rest, mean over the classes that occur.

    It is the chance that a query of the class gets a higher probability of it than one of the
    rest; ties count half.
    """
    from scipy.stats import rankdata

    areas = []
    for label in range(chances.shape[1]):
        mine = truth == label
        here, rest = int(mine.sum()), int((~mine).sum())
        if here and rest:
            ranks = rankdata(chances[:, label])[mine].sum()
            areas.append((ranks - here * (here + 1) / 2) / (here * rest))
    return float(np.mean(areas)) if areas else 0.5


def expected_calibration_error(chances: Doubles, truth: Ints, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their size.

    Source: Guo et al. 2017, eq. 3.
    """
    weights, confidence, right = _binned(chances, truth, bins)
    return float(np.abs(confidence - right).sum() / weights.sum())


def brier_score(chances: Doubles, truth: Ints) -> float:
    """Mean squared distance of the probabilities from the truth, 0 to 2, over all classes.

    Source: Brier 1950.
    """
    return float(np.square(chances - np.eye(chances.shape[1])[truth]).sum(axis=1).mean())


def risk_coverage(chances: Doubles, truth: Ints) -> Doubles:
    """Share of errors among the 1, 2, ... n most confident queries, `(n,)`.

    Queries of equal confidence share their errors, so that their order does not matter.

    Source: Geifman and El-Yaniv 2017; its mean is the area AURC.
    """
    confidence = chances.max(axis=1)
    wrong = (chances.argmax(axis=1) != truth).astype(np.float64)
    _, tied, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shared = np.bincount(tied, weights=wrong) / sizes
    result: Doubles = np.repeat(shared, sizes).cumsum() / np.arange(1, len(wrong) + 1)
    return result


def roc_curve(chance: Doubles, positive: NDArray[np.bool_]) -> dict[str, list[float]]:
    """ROC curve of one class against the rest, at evenly spaced false positive rates."""
    order = np.argsort(-chance, kind="stable")
    last = np.flatnonzero(np.append(np.diff(chance[order]) != 0, True))  # of each tie
    true = np.append(0, np.cumsum(positive[order])[last]) / max(1, int(positive.sum()))
    false = np.append(0, np.cumsum(~positive[order])[last]) / max(1, int((~positive).sum()))
    grid = np.linspace(0, 1, POINTS - 1)
    at = np.interp(grid, false, true)
    at[0] = true[false == 0].max()
    return {
        "false_positive": _rounded(np.append(0, grid)),
        "true_positive": _rounded(np.append(0, at)),
    }


def reliability(chances: Doubles, truth: Ints, bins: int = BINS) -> dict[str, list[float]]:
    """Mean confidence, accuracy and number of queries of each bin that holds one."""
    weights, confidence, right = _binned(chances, truth, bins)
    held = weights > 0
    return {
        "confidence": _rounded(confidence[held] / weights[held]),
        "accuracy": _rounded(right[held] / weights[held]),
        "count": weights[held].astype(int).tolist(),
    }


def _binned(chances: Doubles, truth: Ints, bins: int) -> tuple[Doubles, Doubles, Doubles]:
    """Each bin of confidence: number of queries, sums of their confidence and right answers."""
    confidence = chances.max(axis=1)
    right = (chances.argmax(axis=1) == truth).astype(np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    weights, sums, rights = (
        np.bincount(which, weights=values, minlength=bins).astype(np.float64)
        for values in (np.ones_like(confidence), confidence, right)
    )
    return weights, sums, rights


def _recalls(confusion: Ints) -> Doubles:
    result: Doubles = np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)
    return result


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _rounded(values: Doubles) -> list[float]:
    listed: list[float] = np.round(values, 5).tolist()
    return listed
