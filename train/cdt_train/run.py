"""A whole training run: data, folds, both phases, evaluation, and what is written of them.

OUTPUT_DIR/
recipe.json                   the recipe, compared on resume
phantom_data/                 only without --data-dir
ct_encoder_pretrained.pt      phase 1 (in each fold's folder where CT and tiles are paired)
fold_1/                       checkpoints, curves and figures of a fold
best_model.pt                 the fold with the best validation score
metrics.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.checkpoint import write_json
from cdt_train.config import Recipe, recipe_from
from cdt_train.data.load import read_data
from cdt_train.data.phantom import write_phantom
from cdt_train.engine import Engine
from cdt_train.fold import train_fold
from cdt_train.fold_pictures import fold_captions
from cdt_train.loop import require_same_recipe
from cdt_train.plots import plot_accuracy_by_k
from cdt_train.pretrain import pretrain
from cdt_train.progress import say
from cdt_train.report_html import Report, write_report
from cdt_train.split import make_folds
from cdt_train.summary import summarise

RECORD = "recipe.json"
PHANTOM_DIR = "phantom_data"


def run_training(
    recipe: Recipe,
    *,
    data_dir: Path | None,
    ct_dir: Path | None = None,
    output_dir: Path,
    resume: bool,
) -> dict[str, Any]:
    """Train and evaluate every fold.

    Args:
        recipe: all numbers of the run.
        data_dir: the data, or None for phantom data.
        ct_dir: CT series, where they lie elsewhere.
        output_dir: where everything is written.
        resume: go on with what `output_dir` holds.

    Returns:
        What `metrics.json` holds.

    Raises:
        CdtError: of any kind that the user can mend.
    """
    earlier = _earlier_run(output_dir, recipe, resume)
    if resume and not earlier:
        say(f"nothing to resume in {output_dir}: starting anew")
    training = recipe.training
    engine = Engine.start(
        training.device, training.precision, training.accumulate, output_dir / "logs"
    )
    engine.wait()  # or another process would find what the first one writes below
    if earlier and data_dir is None:
        data_dir = Path(earlier["data_dir"])
        ct_dir = Path(earlier["ct_dir"]) if earlier["ct_dir"] else ct_dir
    data = read_data(recipe, data_dir or _phantom(recipe, output_dir, engine), ct_dir)
    if earlier and earlier["fingerprint"] != data.info["fingerprint"]:
        raise CheckpointError(
            f"{output_dir}: was trained on other data than {data.info['data_dir']} holds now: "
            f"tiles, labels, patients or CT differ: give the same --data-dir, or another "
            f"--output-dir"
        )
    say(f"data: {data.info['data']}")
    folds = make_folds(recipe, data, output_dir)
    record = {
        "recipe": recipe.to_dict(),
        "data_dir": data.info["data_dir"],
        "ct_dir": data.info["ct_dir"],
        "fingerprint": data.info["fingerprint"],
    }
    if engine.is_main:
        write_json(output_dir / RECORD, record)
    shared = None
    if not data.paired:
        shared = pretrain(recipe, data.ct, output_dir, resume, engine, data.info)
    results = []
    for fold in folds:
        encoder = shared or pretrain(recipe, fold.ct, fold.folder, resume, engine, data.info)
        results.append(train_fold(fold, encoder, recipe, data, resume, engine))
    best = max(results, key=lambda result: result["validation"]["best_metric"])
    report = summarise(recipe, data, results, best["fold"])
    if engine.is_main:
        chosen = output_dir / f"fold_{best['fold']}" / "best_model.pt"
        shutil.copyfile(chosen, output_dir / ".best")
        (output_dir / ".best").replace(output_dir / "best_model.pt")
        write_json(output_dir / "metrics.json", report)
        _write_report(output_dir, report)
    engine.close()
    return report


def _write_report(output_dir: Path, report: dict[str, Any]) -> None:
    """Draw accuracy by K and write `report.html` with the pictures of the best fold."""
    by_k = output_dir / "accuracy_by_k.png"
    rows = {
        report["rows"][row]: {int(k): cells["accuracy"] for k, cells in found.items()}
        for row, found in report["over_folds"].items()
    }
    interval = "ci95" if len(report["folds"]) > 2 else "std"
    chance = 1 / len(report["classes"])
    plot_accuracy_by_k(by_k, "Accuracy over folds", rows, chance=chance, interval=interval)
    best = output_dir / f"fold_{report['best_fold']}"
    pictures = {"Accuracy by support tiles a class": by_k, **fold_captions(best)}
    if (output_dir / "curves_ssl.png").is_file():
        pictures["Phase 1: CT pretraining"] = output_dir / "curves_ssl.png"
    write_report(output_dir / "report.html", cast(Report, report), pictures)


def _phantom(recipe: Recipe, output_dir: Path, engine: Engine) -> Path:
    """Write the phantom data that stand in for a data folder."""
    folder = output_dir / PHANTOM_DIR
    say(
        f"no --data-dir: training on phantom data, generated with seed {recipe.training.seed} "
        f"in {folder}: it shows that the pipeline works and says nothing about patients"
    )
    if engine.is_main:
        write_phantom(folder, seed=recipe.training.seed)
    engine.wait()
    return folder


def _earlier_run(output_dir: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Return the record of the run that `output_dir` holds, if it may go on.

    Raises:
        TrainingError: it holds a run and this is not to go on with it.
        CheckpointError: it was another recipe, or its record can't be read.
    """
    path = output_dir / RECORD
    if not path.is_file():
        if (output_dir / "best_model.pt").exists():
            raise TrainingError(
                f"{output_dir} holds a best_model.pt: --output-dir names another folder"
            )
        return None
    if not resume:
        raise TrainingError(
            f"{output_dir} holds a run: --resume goes on with it, --output-dir names another"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        earlier = recipe_from(record["recipe"]).to_dict()  # keys may have been added since
        require_same_recipe(path, earlier, recipe.to_dict())
        return {key: record[key] for key in ("data_dir", "ct_dir", "fingerprint")}
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: can't be read: give another --output-dir") from error
