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
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdt_runtime.errors import DatasetError, RecipeError, TrainingError
from cdt_runtime.preprocess import Preprocess
from cdt_train.checkpoint import load_checkpoint
from cdt_train.config import Recipe
from cdt_train.data import DATASETS, TileDataset
from cdt_train.data.arrays import CtArrays, TileArrays, choose_preprocess, load_ct, load_tiles
from cdt_train.data.phantom import phantom_seed, write_phantom
from cdt_train.episodes import group_folds
from cdt_train.fold import Fold, train_fold
from cdt_train.loop import require_same_recipe
from cdt_train.pretrain import pretrain
from cdt_train.progress import bar, say
from cdt_train.summary import summarise

PHANTOM_DIR = "phantom_data"


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A data set in memory and what is recorded of it.

    Attributes:
        tiles: every tile.
        ct: every volume.
        preprocess: how they were made.
        patients: patient (or group) of each tile.
        info: `dataset_info` of a checkpoint.
    """

    tiles: TileArrays
    ct: CtArrays
    preprocess: Preprocess
    patients: tuple[str, ...]
    info: dict[str, Any]


def run_training(
    recipe: Recipe, *, data_dir: Path | None, output_dir: Path, resume: bool
) -> dict[str, Any]:
    """Train and evaluate every fold.

    Args:
        recipe: all numbers of the run.
        data_dir: the data, or None for phantom data.
        output_dir: where everything is written.
        resume: go on with what `output_dir` holds.

    Returns:
        What `metrics.json` holds.

    Raises:
        CdtError: of any kind that the user can mend.
    """
    _claim(output_dir, recipe, resume)
    device = choose_device(recipe.training.device)
    data = load_data(recipe, data_dir, output_dir)
    say(f"data: {data.info['data']}")
    folds = group_folds(
        data.tiles.labels, data.tiles.groups, recipe.training.num_folds, recipe.training.seed
    )
    paired = set(data.ct.patients) & set(data.patients)
    shared = None if paired else pretrain(recipe, data.ct, output_dir, resume, device, data.info)
    results = []
    for number, test in enumerate(folds, start=1):
        folder = output_dir / f"fold_{number}"
        fold = Fold.part(number, folder, recipe, data.tiles, test, data.patients, data.ct)
        encoder = shared or pretrain(recipe, fold.ct, folder, resume, device, data.info)
        results.append(
            train_fold(fold, encoder, recipe, data.preprocess, data.info, resume, device)
        )
    best = max(results, key=lambda result: result["validation"]["best_metric"])
    shutil.copyfile(output_dir / f"fold_{best['fold']}" / "best_model.pt", output_dir / ".best")
    (output_dir / ".best").replace(output_dir / "best_model.pt")
    report = summarise(recipe, data.info, results, best["fold"])
    write_json(output_dir / "metrics.json", report)
    return report


def load_data(recipe: Recipe, data_dir: Path | None, output_dir: Path) -> LoadedData:
    """Read the data, or write the phantom data and read that.

    Raises:
        CdtError: the data can't be used.
    """
    where = data_dir
    if where is None:
        where = output_dir / PHANTOM_DIR
        say(
            f"no --data-dir: training on phantom data, generated with seed {recipe.training.seed} "
            f"in {where}: it shows that the pipeline works and says nothing about patients"
        )
        write_phantom(where, seed=recipe.training.seed)
    return read_data(recipe, where)


def read_data(recipe: Recipe, data_dir: Path) -> LoadedData:
    """Read a data folder in the recipe's layout.

    Raises:
        RecipeError: no such layout.
        CdtError: the data can't be used.
    """
    if recipe.data.layout not in DATASETS:
        known = ", ".join(DATASETS)
        raise RecipeError(f"data.layout: {recipe.data.layout!r}: expected one of {known}")
    if not data_dir.is_dir():
        raise DatasetError(
            f"{data_dir}: no such folder: --data-dir holds ct_data/ and pathology_data/"
        )
    dataset = DATASETS[recipe.data.layout](data_dir)
    for warning in dataset.warnings:
        say(f"warning: {warning}")
    preprocess = choose_preprocess(dataset, recipe.data)
    tiles = load_tiles(dataset.tiles, dataset.classes, preprocess, data_dir, bar)
    ct = load_ct(dataset, preprocess, bar)
    info = _describe(dataset, data_dir, recipe)
    return LoadedData(
        tiles, ct, preprocess, tuple(sorted({t.patient for t in dataset.tiles})), info
    )


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on.

    Raises:
        TrainingError: a GPU was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise TrainingError(
            "training.device=cuda: torch finds no GPU here: use training.device=cpu"
        )
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _claim(output_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Make sure that nothing of an earlier run is lost or mixed in."""
    record = output_dir / "recipe.json"
    if record.is_file():
        if not resume:
            raise TrainingError(
                f"{output_dir} holds a run: --resume goes on with it, --output-dir names another"
            )
        require_same_recipe(record, json.loads(record.read_text("utf-8")), recipe.to_dict())
        return
    if (output_dir / "best_model.pt").exists():
        load_checkpoint(output_dir / "best_model.pt", ("config",))
        raise TrainingError(
            f"{output_dir} holds a best_model.pt: --output-dir names another folder"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, recipe.to_dict())


def _describe(dataset: TileDataset, data_dir: Path, recipe: Recipe) -> dict[str, Any]:
    phantom = phantom_seed(data_dir)
    groups = {tile.patient for tile in dataset.tiles}
    kind = "patients" if dataset.grouped_by == "patient" else f"{dataset.grouped_by}s"
    counts = f"{len(dataset.tiles)} tiles of {len(groups)} {kind}, {len(dataset.ct)} CT series"
    source = (
        f"phantom data (generated with seed {phantom}, no patients)"
        if phantom is not None
        else f"{recipe.data.layout} layout"
    )
    return {
        "data": f"{source}: {counts}",
        "phantom": phantom is not None,
        "layout": recipe.data.layout,
        "data_dir": str(data_dir.resolve()),
        "classes": list(dataset.classes),
        "grouped_by": dataset.grouped_by,
        "groups": len(groups),
        "tiles": len(dataset.tiles),
        "ct_series": len(dataset.ct),
        "warnings": list(dataset.warnings),
        "seed": recipe.training.seed,
    }
