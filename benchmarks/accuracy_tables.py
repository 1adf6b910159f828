"""The tables of the README, from the figures of `accuracy_parts.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from records import markdown

Figures = Mapping[str, Any]
SHOTS = ("1", "3", "5")


def lung(found: Figures) -> str:
    """Rows of the model and of what it is compared with; then what CT changes."""
    rows = _episodes(found, folds=True)
    eces = ", ".join(f"{found['rows']['without_ct'][k]['ece']['mean']:.3f}" for k in SHOTS)
    return "\n".join(
        [
            rows,
            "",
            f"ECE after calibration, mean over folds, K = 1, 3, 5: {eces}. "
            f"{_effect_of_ct(found, '1')} CT and tiles are of different patients, so there is none "
            "to be had.",
        ]
    )


def lung_seeds(found: Figures) -> str:
    """Mean and spread over seeds."""
    spreads = [over_seeds(found[k]["accuracy"]) for k in SHOTS]
    by_seed = ", ".join(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in spreads)
    count = len(found["1"]["accuracy"])
    eces = "; ".join(", ".join(f"{ece:.3f}" for ece in found[k]["ece"]) for k in SHOTS)
    return (
        f"K = 1, 3, 5, {count} seeds: {by_seed} (± standard deviation over seeds). ECE of each, "
        f"K = 1; 3; 5: {eces}."
    )


def few_labels(found: Figures) -> str:
    """The same rows, from a few labelled tiles a class."""
    return _episodes(found, folds=False)


def novel_class(found: Figures) -> str:
    """A class that training did not see: the model, frozen, against colour statistics."""
    head = ("new class", *(f"K = {k}: model / colour / difference" for k in SHOTS))
    rows = []
    for novel, figures in found.items():
        cells = []
        for k in SHOTS:
            model, colour = (figures["rows"][row][k] for row in ("without_ct", "colour_statistics"))
            gain = figures["difference"][k]
            cells.append(
                f"{100 * model:.1f} / {100 * colour:.1f} / "
                f"{100 * gain['mean']:+.1f} ± {100 * gain['ci95']:.1f}"
            )
        rows.append((novel, *cells))
    return markdown(head, rows)


def control(found: Figures) -> str:
    """The positive control: by CT context, each fold with the interval over its episodes."""
    names = ("with_ct", "without_ct", "wrong_ct", "noise_ct", "protonet", "colour_statistics")
    shown = [name for name in names if name in found["rows"]]
    head = ("1-shot accuracy", "mean over folds", "by fold, ± 95 % over episodes")
    rows = []
    for name in shown:
        figure = found["rows"][name]["1"]
        pairs = zip(figure["accuracy_by_fold"], figure["ci95_by_fold"], strict=True)
        by_fold = ", ".join(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in pairs)
        rows.append((found["titles"][name], f"{100 * figure['accuracy']['mean']:.1f}", by_fold))
    return "\n".join([markdown(head, rows), "", _effect_of_ct(found, "1")])


def ct_probe(found: Figures) -> str:
    """Accuracy of the linear probe over seeds."""
    names = {
        "pretrained": "pretrained encoder",
        "untrained": "untrained encoder",
        "hu_histogram": "histogram of HU",
    }
    rows = [
        (title, f"{100 * np.mean(found[name]):.1f}", _listed(found[name]))
        for name, title in names.items()
    ]
    return markdown(("features", "accuracy", "by seed"), rows)


def shape3d(found: Figures) -> str:
    """AUC and accuracy of each start, with intervals over seeds and over shapes."""
    rows = [
        (f"{row['arm']}, {row['mode']}", *(_supervised(row[name]) for name in ("auc", "accuracy")))
        for row in found["rows"]
    ]
    return markdown(("start", "AUC ± seeds [shapes]", "accuracy ± seeds [shapes]"), rows)


TITLES = {
    "lung": "Lung H&E from nothing, 3-way: 1350 tiles of LC25000, 3 folds by group (copies of one "
    "original stay together; patients are not known), 1000 episodes; in brackets each fold",
    "lung_seeds": "How far seeds spread: the first of these folds, without CT",
    "few_labels": "The first fold with 54 labelled tiles a class for training and validation, "
    "± 95 % over episodes",
    "novel_class": "A class that training never saw: trained on the other two, 3-way episodes on "
    "groups of the first fold. LC25000's classes differ in colour, so that row is high; ± paired, "
    "95 % over episodes",
    "control": "The positive control: phantom patients whose CT agrees with their tiles in 85 of "
    "100 cases, 2-way, 1000 episodes a fold",
    "ct_probe": "What phase 1 taught the CT encoder: 7 regions of one patient's chest told by a "
    "linear probe that was fitted to another's; labels from HU thresholds, mean of both ways",
    "shape3d": "AdrenalMNIST3D, validation split (published, test split: ResNet-50 3D AUC .828)",
}
TABLES: dict[str, Callable[[Figures], str]] = {
    "lung": lung,
    "lung_seeds": lung_seeds,
    "few_labels": few_labels,
    "novel_class": novel_class,
    "control": control,
    "ct_probe": ct_probe,
    "shape3d": shape3d,
}


def _effect_of_ct(found: Figures, k: str) -> str:
    """Each paired difference of the CT rows, over the groups of all folds."""
    shown = [
        f"{each['title']}: {100 * each['mean']:+.1f} ± {100 * each['ci95']:.1f} points"
        for each in found["effect"]
        if each["of_ct"] and each["k"] == k
    ]
    return f"{k}-shot, paired, ± 95 % over groups: {'; '.join(shown)}."


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _episodes(found: Figures, *, folds: bool) -> str:
    head = ("accuracy", *(f"K = {k}" for k in SHOTS))
    rows = [
        (title, *(_accuracy(found["rows"][name][k], folds) for k in SHOTS))
        for name, title in found["titles"].items()
    ]
    return markdown(head, rows)


def _accuracy(figure: Figures, folds: bool) -> str:
    mean = f"{100 * figure['accuracy']['mean']:.1f}"
    if not folds:
        return f"{mean} ± {100 * figure['ci95_by_fold'][0]:.1f}"
    return f"{mean} ({_listed(figure['accuracy_by_fold'])})"


def _supervised(figure: Figures) -> str:
    spread = "" if figure["seeds_ci95"] is None else f" ± {figure['seeds_ci95']:.3f}"
    return f"{figure['value']:.3f}{spread} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)
