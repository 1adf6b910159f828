"""Honest few-shot evaluation: seeded episodes, intervals, controls, calibration.

Every name that an evaluation takes, from the files that hold them:

    scores       episodes drawn once, scored by every method
    metrics      figures and curves of one fold
    intervals    spreads over episodes, folds and groups; paired differences
    calibration  one temperature for each K
    baselines    colour statistics, permuted labels, noise
    deployed     the same tiles embedded by an exported bundle
"""

from __future__ import annotations

from cdt_train.baselines import colour_statistics, noise_ct, noise_embeddings, permuted_labels
from cdt_train.calibration import (
    TEMPERATURES,
    calibrate,
    cross_validated_temperature,
    fit_temperature,
)
from cdt_train.deployed import embed_with_bundle
from cdt_train.intervals import (
    bootstrap_groups,
    over_folds,
    paired_difference,
    pooled_over_folds,
    t_quantile,
    verdict,
)
from cdt_train.metrics import curves, expected_calibration_error, metrics
from cdt_train.scores import (
    EpisodeScores,
    draw_episodes,
    negative_log_likelihood,
    score_episodes,
    score_in_contexts,
    together,
)

__all__ = [
    "TEMPERATURES",
    "EpisodeScores",
    "bootstrap_groups",
    "calibrate",
    "colour_statistics",
    "cross_validated_temperature",
    "curves",
    "draw_episodes",
    "embed_with_bundle",
    "expected_calibration_error",
    "fit_temperature",
    "metrics",
    "negative_log_likelihood",
    "noise_ct",
    "noise_embeddings",
    "over_folds",
    "paired_difference",
    "permuted_labels",
    "pooled_over_folds",
    "score_episodes",
    "score_in_contexts",
    "t_quantile",
    "together",
    "verdict",
]
