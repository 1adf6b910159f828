"""What a run found, over all folds: for `metrics.json` and for the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cdt_train.config import Recipe
from cdt_train.data.load import LoadedData
from cdt_train.evaluate import over_folds

ROWS = {
    "with_ct": "with CT",
    "without_ct": "without CT",
    "untrained_encoder": "untrained encoder",
    "colour_statistics": "colour statistics",
}
COLUMNS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro F1",
    "auc_roc": "AUC-ROC",
    "cohen_kappa": "kappa",
    "mcc": "MCC",
    "ece": "ECE",
}


def summarise(
    recipe: Recipe,
    data: LoadedData,
    folds: Sequence[Mapping[str, Any]],
    best_fold: int,
) -> dict[str, Any]:
    """Return what `metrics.json` holds."""
    table = {
        row: {name: over_folds([fold["test"][row][name] for fold in folds]) for name in COLUMNS}
        for row in ROWS
    }
    facts = ("data", "phantom", "grouped_by", "classes", "warnings", "fingerprint")
    return {
        **{key: data.info[key] for key in facts},
        "paired": data.paired,
        "k_shot": recipe.training.k_shot,
        "seed": recipe.training.seed,
        "best_fold": best_fold,
        "over_folds": table,
        "folds": list(folds),
        "config": recipe.to_dict(),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """Return the table that a run ends with: mean over folds, and its 95 % interval."""
    folds = len(report["folds"])
    episodes = report["folds"][0]["test"]["with_ct"]["episodes"]
    lines = [
        f"{len(report['classes'])}-way {report['k_shot']}-shot on test {report['grouped_by']}s: "
        f"mean of {folds} folds, {episodes} episodes each; ± is the 95 % interval over folds",
        "",
        " " * 20 + "".join(f"{title:>16}" for title in COLUMNS.values()),
    ]
    for row, title in ROWS.items():
        cells = [report["over_folds"][row][name] for name in COLUMNS]
        lines.append(
            f"{title:<20}" + "".join(f"{cell['mean']:>10.3f} ±{cell['ci95']:.2f}" for cell in cells)
        )
    return "\n".join([*lines, "", _reading(report)])


def _reading(report: Mapping[str, Any]) -> str:
    gains = [
        fold["test"]["with_ct"]["accuracy"] - fold["test"]["without_ct"]["accuracy"]
        for fold in report["folds"]
    ]
    gain = over_folds(gains)
    if report["paired"]:
        return (
            "With CT means another patient's here: the gain from a patient's own CT is not "
            "measured."
        )
    verdict = "a gain" if gain["mean"] - gain["ci95"] > 0 else "no gain shown"
    text = (
        f"CT against no CT, same episodes: {100 * gain['mean']:+.1f} points "
        f"± {100 * gain['ci95']:.1f}: {verdict}. Gate of the bridge in each fold (0 is closed): "
        + ", ".join(f"{fold['gate']:+.3f}" for fold in report["folds"])
    )
    plain = report["over_folds"]["colour_statistics"]["accuracy"]["mean"]
    if report["over_folds"]["without_ct"]["accuracy"]["mean"] <= plain:
        text += "\nNot better than colour statistics alone: this model has learnt nothing of use."
    if report["phantom"]:
        text += "\nPhantom data: these figures say that the pipeline learns, nothing of patients."
    return text
