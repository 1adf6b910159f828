"""What a run found, over all folds: for `metrics.json`, the report and the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cdt_train.config import Recipe
from cdt_train.data.load import LoadedData
from cdt_train.intervals import over_folds, pooled_over_folds, verdict
from cdt_train.rows import ROWS

COLUMNS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro F1",
    "auc_roc": "AUC-ROC",
    "cohen_kappa": "kappa",
    "mcc": "MCC",
    "ece": "ECE",
}
MEASURED = (*COLUMNS, "brier", "nll", "aurc", "accuracy_at_80")
Folds = Sequence[Mapping[str, Any]]


def summarise(recipe: Recipe, data: LoadedData, folds: Folds, best_fold: int) -> dict[str, Any]:
    """Return what `metrics.json` holds."""
    facts = ("data", "phantom", "grouped_by", "classes", "warnings", "fingerprint")
    rows = {row: title for row, title in ROWS.items() if row in folds[0]["test"]}
    k_shot = recipe.training.k_shot
    report = {
        **{key: data.info[key] for key in facts},
        "paired": data.paired,
        "k_shot": k_shot,
        "seed": recipe.training.seed,
        "best_fold": best_fold,
        "rows": rows,
        "episodes": folds[0]["test"]["without_ct"][str(k_shot)]["episodes"],
        "over_folds": {row: _over_folds(folds, row) for row in rows},
        "effect": _effects(folds),
        "calibration": _calibration(folds),
        "folds": list(folds),
        "config": recipe.to_dict(),
    }
    return {**report, "verdict": reading(report)}


def as_text(report: Mapping[str, Any]) -> str:
    """Return the tables that a run ends with: mean over folds, and its 95 % interval."""
    return "\n\n".join(
        [
            *(_table(report, k) for k in report["over_folds"]["without_ct"]),
            report["verdict"],
        ]
    )


def reading(report: Mapping[str, Any]) -> str:
    """Say what the figures come down to, for the K that was trained for."""
    k, lines = str(report["k_shot"]), []
    gates = ", ".join(f"{fold['gate']:+.3f}" for fold in report["folds"])
    found = [effect for effect in report["effect"] if effect["k"] == k and effect["of_ct"]]
    lines += [
        f"{effect['title']}, {k}-shot: {100 * effect['mean']:+.1f} points "
        f"± {100 * effect['ci95']:.1f} over {effect['groups']} {report['grouped_by']}s (95 %)"
        + (f": {effect['verdict']}." if report["paired"] else ".")
        for effect in found
    ]
    if found:
        gains = [effect["mean"] - effect["ci95"] > 0 for effect in found]
        if not report["paired"]:
            lines.append(
                "CT and tiles are of different patients: there is no gain to be had from what the "
                "CT shows, and differences are chance."
            )
        elif all(gains):
            lines.append("The CT helps: more than none, than a wrong patient's and than noise.")
        else:
            lines.append("No gain from the CT's content: it would have to beat every control.")
        whose = "the patient's own" if report["paired"] else "another patient's"
        lines.append(f"The CT is {whose}. Gate of the bridge by fold (0 is closed): {gates}.")
    else:
        lines.append("There was no CT: nothing is said about it.")
    rows = report["over_folds"]
    if (
        rows["without_ct"][k]["accuracy"]["mean"]
        <= rows["colour_statistics"][k]["accuracy"]["mean"]
    ):
        lines.append(
            "Not better than colour statistics alone: this model has learnt nothing of use."
        )
    if report["phantom"]:
        lines.append(
            "Phantom data: these figures say that the pipeline learns, nothing of patients."
        )
    return "\n".join(lines)


def _over_folds(folds: Folds, row: str) -> dict[str, dict[str, dict[str, float]]]:
    return {
        k: {
            name: over_folds([fold["test"][row][k][name] for fold in folds])
            for name in MEASURED
            if name in folds[0]["test"][row][k]
        }
        for k in folds[0]["test"][row]
    }


def _effects(folds: Folds) -> list[dict[str, Any]]:
    """Differences of rows on the same episodes, over the groups of all folds."""
    found = []
    for name in folds[0]["differences"]:
        first, second = name.split(" - ")
        for k in folds[0]["differences"][name]:
            by_fold = [fold["differences"][name][k] for fold in folds]
            pooled = pooled_over_folds(by_fold)
            found.append(
                {
                    "title": f"{ROWS[first]} against {ROWS[second]}",
                    "k": k,
                    "of_ct": first == "with_ct",
                    **pooled,
                    "over_folds": over_folds([each["mean"] for each in by_fold]),
                    "by_fold": by_fold,
                    "verdict": verdict(pooled["mean"], pooled["ci95"]),
                }
            )
    return found


def _calibration(folds: Folds) -> dict[str, dict[str, float]]:
    """Mean temperature of each K, and the calibration error on test tiles, out of sample."""
    row = "with_ct" if "with_ct" in folds[0]["test"] else "without_ct"
    return {
        k: {
            "temperature": _mean(
                [fold["calibration"]["temperatures_with_ct"][k] for fold in folds]
            ),
            "ece_before": _mean([fold["test"][row][k]["ece_before"] for fold in folds]),
            "ece_after": _mean([fold["test"][row][k]["ece"] for fold in folds]),
        }
        for k in folds[0]["test"][row]
    }


def _table(report: Mapping[str, Any], k: str) -> str:
    folds = len(report["folds"])
    means = "the 95 % interval over folds" if folds > 1 else "of one fold: no interval"
    heading = (
        f"{len(report['classes'])}-way {k}-shot on test {report['grouped_by']}s: mean of {folds} "
        f"fold(s), {report['episodes']} episodes each; ± is {means}"
    )
    cells = {row: by_k[k] for row, by_k in report["over_folds"].items()}
    return rows_table(heading, report["rows"], cells, folds=folds)


def rows_table(
    heading: str,
    rows: Mapping[str, str],
    cells: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    folds: int,
) -> str:
    """Return a table of one K.

    Args:
        heading: the line above it.
        rows: title of each row.
        cells: for each row and metric `mean` and, of several folds, `ci95`.
        folds: how many there are.
    """
    lines = [heading, "", " " * 22 + "".join(f"{title:>15}" for title in COLUMNS.values())]
    for row, title in rows.items():
        found = cells[row]
        lines.append(f"{title:<22}" + "".join(_cell(found.get(name), folds) for name in COLUMNS))
    return "\n".join(lines)


def _cell(spread: Mapping[str, float] | None, folds: int) -> str:
    if spread is None:
        return f"{'–':>15}"
    if folds < 2:
        return f"{spread['mean']:>15.3f}"
    return f"{spread['mean']:>9.3f} ±{spread['ci95']:.2f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
