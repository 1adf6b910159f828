"""The parts of `accuracy.py`: each prepares data, runs commands and picks out the figures."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SHOTS = ("1", "3", "5")
FOLDS, SEEDS = 3, 3
LABELS = 54
"""Labelled tiles of a class that `few_labels` trains and validates with."""

SHORT = (
    *("training.tile_size=128", "training.encoder_epochs=8"),
    *("training.num_epochs=2", "training.episodes_per_epoch=60"),
)
"""Of the lung recipe, what `novel_class` changes: three models in the time of one."""

Row = dict[str, str]


def lung(bench: Any) -> dict[str, Any]:
    """Real lung H&E, held-out groups: every fold, with one seed."""
    found = _lung_run(bench)
    return {
        "rows": {row: {k: _folds_of(found, row, k) for k in SHOTS} for row in found["rows"]},
        "titles": found["rows"],
        "effect": found["effect"],
        "gates": [fold["gate"] for fold in found["folds"]],
    }


def lung_seeds(bench: Any) -> dict[str, Any]:
    """The first fold with several seeds of phases 2 and 3.

    Phase 1 is one for all: the figures are of tiles without CT.
    """
    data = _write_csv(bench.work / "data", _lung_rows(bench))
    found = [
        _train(
            bench,
            bench.work / f"seed_{seed}",
            *_lung_words(bench, data),
            *(f"training.seed={seed}", "training.folds=[1]"),
        )
        for seed in range(SEEDS)
    ]
    return {
        k: {
            name: [_of(one["folds"][0], "without_ct", k, name) for one in found]
            for name in ("accuracy", "ece")
        }
        for k in SHOTS
    }


def few_labels(bench: Any) -> dict[str, Any]:
    """The first fold again, trained and validated with a few labelled tiles a class."""
    rows = _lung_rows(bench)
    kept = []
    for label in sorted({row["label"] for row in rows}):
        train = [row for row in rows if row["label"] == label and row["fold"] != "1"]
        order = np.random.default_rng(LABELS).permutation(len(train))
        kept += [train[place] | {"fold": "train"} for place in sorted(order[:LABELS])]
    test = [row | {"fold": "test"} for row in rows if row["fold"] == "1"]
    data = _write_csv(bench.work / "data", kept + test)
    found = _train(bench, bench.work / "model", *_lung_words(bench, data))
    return {
        "labels_a_class": LABELS,
        "rows": {row: {k: _folds_of(found, row, k) for k in SHOTS} for row in found["rows"]},
        "titles": found["rows"],
    }


def novel_class(bench: Any) -> dict[str, Any]:
    """Train on two classes; episodes of all three on the test groups, the third being new."""
    rows = _lung_rows(bench)
    found = {}
    for novel in sorted({row["label"] for row in rows}):
        folder = bench.work / novel
        base = [row for row in rows if row["fold"] != "1" and row["label"] != novel]
        test = [row for row in rows if row["fold"] == "1"]
        known = [row | {"fold": "test" if row["fold"] == "2" else "train"} for row in base]
        data = _write_csv(folder / "base", known)
        _train(bench, folder / "model", *_lung_words(bench, data), *SHORT)
        unseen = [{key: value for key, value in row.items() if key != "fold"} for row in test]
        report = _evaluate(bench, folder, _write_csv(folder / "test", unseen))
        found[novel] = {
            "rows": {
                row: {k: report["test"][row][k]["accuracy"] for k in SHOTS}
                for row in ("without_ct", "colour_statistics")
            },
            "difference": {
                k: report["differences"]["without_ct - colour_statistics"][k] for k in SHOTS
            },
        }
    return found


def control(bench: Any) -> dict[str, Any]:
    """The positive control: phantom patients whose CT agrees with their tiles in 85 of 100."""
    from cdt_train.data.phantom_paired import write_paired_phantom

    data = bench.work / "data"
    write_paired_phantom(data, n_patients=180, tiles_per_patient=2, agreement=0.85, mixing=0.4)
    found = _train(
        bench, bench.work / "model", "--config", CONFIGS / "control.yaml", "--data-dir", data
    )
    shots = [k for k in SHOTS if k in found["over_folds"]["with_ct"]]
    return {
        "rows": {row: {k: _folds_of(found, row, k) for k in shots} for row in found["rows"]},
        "titles": found["rows"],
        "effect": found["effect"],
        "verdict": found["verdict"],
    }


def ct_probe(bench: Any) -> dict[str, Any]:
    """What phase 1 learnt: regions of one patient told by a linear probe fitted to another."""
    from ct_probe import probe

    found = []
    for seed in range(SEEDS):
        found.append(probe(_pretrained(bench, seed), bench.data / "ct", seed))
    return {name: [one[name] for one in found] for name in found[0]}


def shape3d(bench: Any) -> dict[str, Any]:
    """AdrenalMNIST3D: our 3D encoder from scratch, pretrained, and pretrained but permuted."""
    bench.train(
        "compare",
        bench.data / "shape3d" / "adrenalmnist3d_64_trainval.npz",
        *("--layout", "medmnist", "--image-size", "32", "--tta", "--epochs", "12"),
        *("--learning-rate", "3e-3", "--ema-decay", "0.98", "--ssl", "--ssl-epochs", "8"),
        *("--output-dir", bench.work / "model"),
    )
    found: dict[str, Any] = json.loads((bench.work / "model" / "compare.json").read_text("utf-8"))
    return found


def _lung_run(bench: Any) -> dict[str, Any]:
    words = _lung_words(bench, _write_csv(bench.work / "data", _lung_rows(bench)))
    return _train(bench, bench.work / "seed_0", *words)


def _lung_words(bench: Any, data: Path) -> tuple[str | Path, ...]:
    """What every part that trains on lung tiles types; phase 1 is done once for all of them."""
    return (*_recipe_words(bench, data, 0), f"model.ct_encoder={_pretrained(bench, 0)}")


def _recipe_words(bench: Any, data: Path, seed: int) -> tuple[str | Path, ...]:
    words = ("--config", CONFIGS / "lung.yaml", "--data-dir", data, "--ct-dir", bench.data / "ct")
    return (*words, f"training.seed={seed}")


def _pretrained(bench: Any, seed: int) -> Path:
    """Phase 1 of the lung recipe, and next to nothing of the others."""
    if seed in bench.pretrained:
        return Path(bench.pretrained[seed])
    folder = bench.work.parent / "phase_1"
    words = (
        *_recipe_words(bench, _write_csv(folder / "data", _lung_rows(bench)), seed),
        "training.encoder_epochs=0",
        "training.view_epochs=0",
        "training.num_epochs=1",
        "training.episodes_per_epoch=1",
        "training.val_episodes=2",
        "training.test_episodes=2",
        "training.folds=[1]",
    )
    _train(bench, folder / f"seed_{seed}", *words)
    bench.pretrained[seed] = folder / f"seed_{seed}" / "ct_encoder_pretrained.pt"
    return Path(bench.pretrained[seed])


def _train(bench: Any, output: Path, *words: str | Path) -> dict[str, Any]:
    """Train into a folder, or go on there."""
    bench.train(*words, "--output-dir", output, "--resume")
    report: dict[str, Any] = json.loads((output / "metrics.json").read_text("utf-8"))
    return report


def _evaluate(bench: Any, folder: Path, data: Path) -> dict[str, Any]:
    model = folder / "model" / "best_model.pt"
    words = ("evaluate", model, "--data-dir", data, "--layout", "csv", "--json")
    report: dict[str, Any] = json.loads(bench.train(*words))
    return report


def _lung_rows(bench: Any) -> list[Row]:
    """Unpack the lung tiles and part their groups into folds, the same for every seed.

    Returns:
        `path`, `label`, `group` and `fold` of each tile.
    """
    tiles = bench.work.parent / "lung_tiles"
    if not (tiles / "manifest.csv").is_file():
        with zipfile.ZipFile(bench.data / "pathology" / "lc25000_lung_dev.zip") as archive:
            archive.extractall(tiles)
    with (tiles / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    fold = _folds({row["group"]: row["label"] for row in rows})
    return [
        {
            "path": str(tiles / row["path"]),
            "label": row["label"],
            "group": row["group"],
            "fold": fold[row["group"]],
        }
        for row in rows
    ]


def _folds(label_of_group: Mapping[str, str]) -> dict[str, str]:
    """Deal the groups of each class out to the folds, in a seeded order."""
    rng, folds = np.random.default_rng(0), {}
    for label in sorted(set(label_of_group.values())):
        groups = sorted(group for group, own in label_of_group.items() if own == label)
        for place, index in enumerate(rng.permutation(len(groups))):
            folds[groups[index]] = str(1 + place % FOLDS)
    return folds


def _write_csv(folder: Path, rows: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _folds_of(report: Mapping[str, Any], row: str, k: str) -> dict[str, Any]:
    """Mean and interval over folds of every metric, and the accuracy of each fold."""
    each = [fold["test"][row][k] for fold in report["folds"]]
    intervals = [fold["over_groups"].get(row, {}).get(k) for fold in report["folds"]]
    return {
        **report["over_folds"][row][k],
        "accuracy_by_fold": [one["accuracy"] for one in each],
        "ci95_by_fold": [one["accuracy_ci95"] for one in each],
        "over_groups": [interval for interval in intervals if interval],
    }


def _of(fold: Mapping[str, Any], row: str, k: str, name: str) -> float:
    value: float = fold["test"][row][k][name]
    return value
