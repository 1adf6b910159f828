"""Three spreads of a figure: over episodes, over folds or seeds, and over groups of tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_train.metrics import half_width
from cdt_train.scores import EpisodeScores, Ints

DRAWS = 2000
"""Of a bootstrap."""


def over_folds(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation and half-width of the 95 % t-interval over folds or seeds.

    With two values the quantile of Student's t is 12.7: the interval is right and says nothing, so
    a table shows `std` beside it; `n` is the number of values.
    """
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return {
        "mean": float(array.mean()),
        "std": spread,
        "ci95": t_quantile(len(array) - 1) * spread / math.sqrt(len(array)),
        "n": len(array),
    }


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; 0 for no degree of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else 0.0


def bootstrap_groups(
    values: NDArray[Any], groups: Ints, *, seed: int = 0, draws: int = DRAWS
) -> dict[str, float]:
    """Interval of a mean over queries when whole groups (patients) are drawn again.

    Episodes can be drawn without end, patients can't: with few of them this interval is the widest
    and the truest. It leaves out what another support set would change.

    Args:
        values: `(n_queries,)`, such as `EpisodeScores.correct`, or the difference of two of them.
        groups: `(n_queries,)`, the group of each query tile.
        seed: of the draws.
        draws: how many.

    Returns:
        `mean`, `low` and `high` (2.5th and 97.5th percentile) and the number of `groups`.
    """
    names, place = np.unique(groups, return_inverse=True)
    sums = np.bincount(place, weights=values.astype(np.float64))
    counts = np.bincount(place)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    low, high = np.percentile((times @ sums) / (times @ counts), [2.5, 97.5])
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "groups": len(names),
    }


def paired_difference(
    first: EpisodeScores, second: EpisodeScores, groups: Ints, *, seed: int = 0
) -> dict[str, float]:
    """Difference in accuracy, first less second, on the same episodes.

    Args:
        first: one scoring.
        second: another of the same episodes.
        groups: `(n_tiles,)`, the group of each tile that `queries` count.
        seed: of the bootstrap.

    Returns:
        `mean`; half-width `ci95` of the normal 95 % interval over `episodes`; `low` and `high` of
        the bootstrap over `groups`, as `bootstrap_groups` has them.

    Raises:
        ValueError: they scored other episodes, or do not know which.
    """
    if len(first.queries) == 0 or not np.array_equal(first.queries, second.queries):
        raise ValueError("a paired difference takes two scorings of the same episodes, in order")
    differences = first.accuracies - second.accuracies
    changed = first.correct.astype(np.float64) - second.correct
    return {
        **bootstrap_groups(changed, groups[first.queries], seed=seed),
        "mean": float(differences.mean()),
        "ci95": half_width(differences),
        "episodes": len(differences),
    }


def pooled_over_folds(differences: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of the paired differences of folds, with its interval over the groups of all of them.

    Every group is tested in one fold alone, so the folds' bootstraps are independent and their
    variances add up. The t-interval over folds (`over_folds`) asks more: what folds to come would
    give, from a handful of values.

    Args:
        differences: of each fold, as `paired_difference` gives them.

    Returns:
        `mean`, half-width `ci95` over groups, and the number of `groups`.
    """
    halves = [(each["high"] - each["low"]) / 2 for each in differences]
    return {
        "mean": float(np.mean([each["mean"] for each in differences])),
        "ci95": math.sqrt(math.fsum(half**2 for half in halves)) / len(halves),
        "groups": int(sum(each["groups"] for each in differences)),
    }


def verdict(mean: float, half: float) -> str:
    """Say in words whether a difference is above zero with its interval."""
    if mean - half > 0:
        return "a gain"
    return "a loss" if mean + half < 0 else "no difference shown"
