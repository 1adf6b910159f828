"""Results out: JSON lines for machines, a few plain lines for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.prediction import CtChange, Prediction

CANT_TELL = "can't tell"
NOTICE = "Research use only: not a medical device."


def as_record(prediction: Prediction, classifier: FewShotClassifier) -> dict[str, Any]:
    """Return the JSON object of one prediction; the README lists its keys."""
    change = prediction.ct_change
    return {
        "tile": prediction.tile,
        "sha256": prediction.sha256,
        "label": prediction.label,
        "nearest": prediction.nearest,
        "probabilities": prediction.probabilities,
        "distances": prediction.distances,
        "abstained": prediction.abstained,
        "reason": prediction.reason,
        "unlikeness": round(prediction.unlikeness, 3),
        "tta": classifier.tta,
        "coverage": classifier.coverage,
        "prediction_set": prediction.prediction_set,
        "ct": asdict(prediction.ct) if prediction.ct else None,
        "ct_change": asdict(change) if change else None,
        "channels": prediction.channels,
        "warnings": list(prediction.warnings),
        "backend": classifier.engine,
        "bundle": bundle_name(classifier.bundle),
        "training_data": classifier.bundle.manifest["training"]["data"],
        "timings_ms": prediction.timings_ms,
    }


def as_json(prediction: Prediction, classifier: FewShotClassifier) -> str:
    """Return the JSON line of one prediction."""
    return json.dumps(as_record(prediction, classifier), ensure_ascii=False)


def failure_as_json(tile: str, message: str) -> str:
    """Return the JSON line of a tile that could not be used."""
    return json.dumps({"tile": tile, "error": message}, ensure_ascii=False)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Shorten paths to as few of their last parts as tell them all apart.

    Patients' folders often hold files of one name: `tile.ome.tif` would then name none of them.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    distinct = len(set(parts))
    depth = 1
    while len({part[-depth:] for part in parts}) < distinct:
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def as_text(prediction: Prediction) -> str:
    """Return what a person reads of one prediction."""
    chances = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    if prediction.abstained:
        verdict = f"{CANT_TELL} ({prediction.reason})"
    else:
        verdict = f"{prediction.label}  {chances[0][1]:.2f}"
    width = max(len(name) for name, _ in chances)
    lines = [f"{prediction.tile}: {verdict}"]
    lines += [
        f"    {name:<{width}}  probability {chance:.3f}  distance {prediction.distances[name]:.3f}"
        for name, chance in chances
    ]
    if prediction.prediction_set is not None:
        lines.append(f"    set: {', '.join(prediction.prediction_set) or 'no class'}")
    if prediction.ct_change:
        lines.append(f"    {_change_text(prediction, prediction.ct_change)}")
    renamed = [f"{ours} <- {theirs}" for ours, theirs in prediction.channels.items() if theirs]
    if any(ours != theirs for ours, theirs in prediction.channels.items() if theirs):
        lines.append(f"    channels: {', '.join(renamed)}")
    lines += [f"    warning: {warning}" for warning in prediction.warnings]
    return "\n".join(lines)


def context_text(
    classifier: FewShotClassifier, prediction: Prediction, outcomes: Mapping[str, int]
) -> str:
    """Return the lines that hold for all tiles of a run: CT, bundle, engine, training data.

    Args:
        classifier: that answered.
        prediction: one of its answers.
        outcomes: of how many tiles what was said; of a single tile that is not repeated.
    """
    counts = classifier.prototypes.counts()
    support = ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = [
        *_outcomes_text(outcomes),
        f"CT        {_ct_text(prediction)}",
        f"bundle    {bundle_name(classifier.bundle)}; support tiles: {support}",
        f"engine    {classifier.engine}",
        f"trained   on {classifier.bundle.manifest['training']['data']}",
        NOTICE,
    ]
    return "\n".join(lines)


def _outcomes_text(outcomes: Mapping[str, int]) -> list[str]:
    total = sum(outcomes.values())
    if total < 2:
        return []
    ordered = sorted(outcomes.items(), key=lambda item: (item[0] != "answered", -item[1]))
    return [f"tiles     {total}: {', '.join(f'{count} {name}' for name, count in ordered)}"]


def bundle_name(bundle: Bundle) -> str:
    """Name a bundle as results do: its folder and the start of its hash."""
    return f"{bundle.path.name} ({bundle.manifest['precision']}, {bundle.identity})"


def _change_text(prediction: Prediction, change: CtChange) -> str:
    """Say what the CT would change: the answer, and the probability of the class it is nearest."""
    same = change.label == prediction.label
    answer = "the same" if same else change.label or CANT_TELL
    shift = change.shift[change.nearest]
    chance = prediction.probabilities[change.nearest] + shift
    return (
        f"with the CT (not used): {answer}, probability of {change.nearest} {chance:.3f} "
        f"({shift:+.3f})"
    )


def _ct_text(prediction: Prediction) -> str:
    ct = prediction.ct
    if ct is None:
        return "none: the tile alone decides"
    timings = prediction.timings_ms
    if ct.cache_hit:
        source = "tokens from the cache"
    else:
        source = f"read in {timings['ct_read']:.0f} ms, encoded in {timings['ct_encode']:.0f} ms"
    text = "; ".join([ct.series, source, *(f"warning: {warning}" for warning in ct.warnings)])
    return f"{text}\n          {ct.off}" if ct.off else text
