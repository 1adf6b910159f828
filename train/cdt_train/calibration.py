"""Calibration: probabilities that are right as often as they say.

One temperature for each K. Measured out of sample on two data sets, a second parameter (a floor
of doubt, a power of the margin, a bias a class) was no better than the temperature alone once
prototypes were fitted by ridge regression, so there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cdt_runtime.prototypes import softmax
from cdt_train.metrics import expected_calibration_error
from cdt_train.scores import Doubles, EpisodeScores, Ints, negative_log_likelihood

TEMPERATURES = (0.5, 20.0)
"""Bounds of the fitted temperature."""

_STEPS = 25


def fit_temperature(scores: EpisodeScores) -> float:
    """Find the temperature with the least negative log-likelihood, from 0.5 to 20.

    A few validation patients that are all classified rightly would ask for an ever lower
    temperature, that is, for certainty: below 0.5 they are not believed.

    Source: Guo et al. 2017.
    """
    return _least(scores.logits, scores.truth)


def calibrate(scores_by_k: Mapping[int, EpisodeScores]) -> dict[int, float]:
    """Fit one temperature for each number of support tiles a class.

    More support tiles make prototypes that lie further from chance, so one temperature does not
    serve all.

    Args:
        scores_by_k: for each K, episodes over tiles that no weight was fitted to. Calibration
            tiles are few: give `together` of several draws of episodes, and of all contexts (with
            CT and without) that the temperature is to serve.
    """
    return {k: fit_temperature(scores) for k, scores in scores_by_k.items()}


def cross_validated_temperature(
    scores: EpisodeScores, groups: Ints, *, parts: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Fit a temperature, and measure on held-out groups what such a fit is worth.

    The calibration error on the tiles that the temperature was fitted to flatters it. Here the
    queries are parted by group; each part is calibrated by the temperature of the others.

    Args:
        scores: of the calibration tiles, pooled over draws.
        groups: `(n_queries,)`, the group of each query tile.
        parts: at most; fewer where there are fewer groups, but at least 2 groups are needed.
        seed: of the parting.

    Returns:
        `temperature` fitted to all; `ece_before` at temperature 1 and `ece` and `nll` out of
        sample; `temperatures` of the parts, whose spread says how far to trust it.

    Raises:
        ValueError: all queries are of one group.
    """
    side = _parted(groups, parts, seed)
    scaled = np.empty_like(scores.logits)
    temperatures = []
    for part in range(side.max() + 1):
        held = side == part
        temperatures.append(_least(scores.logits[~held], scores.truth[~held]))
        scaled[held] = scores.logits[held] / temperatures[-1]
    return {
        "temperature": fit_temperature(scores),
        "ece_before": expected_calibration_error(softmax(scores.logits), scores.truth),
        "ece": expected_calibration_error(softmax(scaled), scores.truth),
        "nll": negative_log_likelihood(scaled, scores.truth),
        "temperatures": temperatures,
    }


def _parted(groups: Ints, parts: int, seed: int) -> Ints:
    """Number of the part that each query's group falls into."""
    names, place = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError("cross-validation takes calibration tiles of at least two groups")
    turn = np.arange(len(names)) % min(parts, len(names))
    result: Ints = np.random.default_rng(seed).permutation(turn)[place]
    return result


def _least(logits: Doubles, truth: Ints) -> float:
    """Search the logarithm of the temperature twice, the second time around the best of the first.

    The loss is convex in the inverse temperature, so that no valley is missed.
    """
    low, high = (math.log(bound) for bound in TEMPERATURES)
    best = low
    for _ in range(2):
        grid = np.linspace(low, high, _STEPS)
        losses = [negative_log_likelihood(logits / math.exp(t), truth) for t in grid]
        place = int(np.argmin(losses))
        best = float(grid[place])
        low, high = float(grid[max(0, place - 1)]), float(grid[min(_STEPS - 1, place + 1)])
    return math.exp(best)
