"""Metrics of a supervised classifier, each with an interval from resampled groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cdt_train.metrics import confusion_counts, decision_metrics, expected_calibration_error

Task = Literal["binary", "multiclass", "multilabel"]
Floats = NDArray[np.float64]
Found = dict[str, float]

METRICS = ("auc", "accuracy", "balanced_accuracy", "macro_f1", "cohen_kappa", "mcc", "ece")


def supervised_metrics(chances: Floats, truth: NDArray[Any], task: Task) -> Found:
    """Compute every metric once; one that the data do not define is NaN.

    AUC is one class against the rest, the mean over classes. Multi-label figures are means over
    labels, each decided at 0.5.

    Args:
        chances: `(n, K)`, rows of sum 1, or `(n, L)` of independent labels.
        truth: `(n,)` classes, or `(n, L)` 0 and 1.
        task: binary has K = 2.
    """
    if task == "multilabel":
        return _over_labels(chances, truth)
    labels = truth.astype(np.int64)
    one_hot = labels[:, None] == np.arange(chances.shape[1])
    ranked = slice(1, 2) if task == "binary" else slice(None)
    return {
        "auc": macro_auc(chances[:, ranked], one_hot[:, ranked]),
        "accuracy": float((chances.argmax(axis=1) == labels).mean()),
        **decision_metrics(confusion_counts(labels, chances)),
        "ece": expected_calibration_error(chances, labels),
    }


def with_intervals(
    compute: Callable[[NDArray[np.int64]], Found],
    groups: NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Add to each figure its 95 % interval over resampled groups.

    Args:
        compute: figures of the items that it is given by index.
        groups: `(n,)`; what belongs to one group is drawn together.
        resamples: how often groups are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        For each figure `value`, `low` and `high`; None where it is not defined.
    """
    whole = compute(np.arange(len(groups)))
    drawn = [compute(chosen) for chosen in resampled(groups, resamples, seed)]
    return {
        key: {"value": _defined(value), **_interval([found[key] for found in drawn])}
        for key, value in whole.items()
    }


def resampled(groups: NDArray[Any], count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the items of groups drawn with replacement, `count` times."""
    rng = np.random.default_rng(seed)
    _, which = np.unique(groups, return_inverse=True)
    order = np.argsort(which, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(which))[:-1])
    for _ in range(count):
        drawn = rng.integers(0, len(members), len(members))
        yield np.concatenate([members[index] for index in drawn])


def macro_auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Mean area under the ROC curve over columns; those with one class alone are left out."""
    areas = [_auc(scores[:, k], positive[:, k]) for k in range(scores.shape[1])]
    return _mean([area for area in areas if not np.isnan(area)])


def _auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Share of pairs in which the positive scores higher; ties count half."""
    from scipy.stats import rankdata

    high = int(positive.sum())
    low = len(positive) - high
    if high == 0 or low == 0:
        return float("nan")
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - high * (high + 1) / 2) / (high * low))


def _over_labels(chances: Floats, truth: NDArray[Any]) -> Found:
    positive = truth > 0.5
    auc = macro_auc(chances, positive)
    single = [
        supervised_metrics(np.stack([1 - chance, chance], axis=1), label, "binary")
        for chance, label in zip(chances.T, positive.T, strict=True)
    ]
    rest = {key: _mean([found[key] for found in single]) for key in METRICS[1:]}
    return {"auc": auc, **rest}


def _interval(values: list[float]) -> dict[str, float | None]:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return {"low": None, "high": None}
    low, high = np.quantile(known, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
