"""One fold of a run: training, calibration, and tests on patients that nothing has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdt_train.calibration import TEMPERATURES
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_json
from cdt_train.config import Recipe
from cdt_train.data.load import LoadedData
from cdt_train.embed import embed_tiles
from cdt_train.engine import Engine
from cdt_train.fold_phases import (
    FoldRun,
    new_model,
    settle,
    started,
    train_episodes,
    train_protonet,
    train_tiles,
)
from cdt_train.fold_pictures import draw_fold
from cdt_train.intervals import bootstrap_groups
from cdt_train.metrics import metrics
from cdt_train.models.transfer_model import TransferModel
from cdt_train.progress import say
from cdt_train.rows import (
    Scores,
    differences,
    embed_rows,
    frozen_rows,
    measure,
    over_groups,
    score_rows,
    surroundings,
    temperatures,
)
from cdt_train.split import TEST_CT, Fold


def train_fold(
    fold: Fold,
    ct_encoder: Mapping[str, Tensor],
    recipe: Recipe,
    data: LoadedData,
    resume: bool,
    engine: Engine,
) -> dict[str, Any]:
    """Train, calibrate and evaluate one fold; a finished one is taken up on resume.

    Returns:
        What `fold_N/metrics.json` holds.
    """
    record, best_path = fold.folder / "metrics.json", fold.folder / "best_model.pt"
    if resume and record.is_file():
        done: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return done
    say(
        f"fold {fold.number}: {len(fold.train)} training, {len(fold.val)} validation and "
        f"{len(fold.test)} test tiles, all of different {data.info['grouped_by']}s"
    )
    run = FoldRun(fold, recipe, data, engine, resume)
    learnt, features = train_tiles(run)
    before = started(run, features, ct_encoder)
    plain = train_protonet(run, features, ct_encoder)
    history = train_episodes(run, features, ct_encoder)
    best = load_checkpoint(best_path, ("model_state_dict", "best_metric", "epoch"))
    model = new_model(fold, recipe)
    load_weights(model, best["model_state_dict"], best_path)
    settle(run, model)
    best["model_state_dict"] = {key: value.cpu() for key, value in model.state_dict().items()}
    tested = evaluate_fold(run, model, plain, before)
    result = {
        "fold": fold.number,
        "tiles": {side: len(names) for side, names in fold.split.items()},
        "validation": {"epoch": best["epoch"], "best_metric": best["best_metric"]},
        "gate": float(torch.tanh(model.bridge.gate).item()),
        "history": {**learnt, "episodes": history},
        **tested.record,
    }
    if engine.is_main:
        content = {**best, "calibration": result["calibration"], "test": result["test"]}
        save_checkpoint(best_path, content)
        draw_fold(fold, result, tested, model, before, engine.device)
        write_json(record, result)
    return result


@dataclass(frozen=True, eq=False)
class Tested:
    """What a model shows on the test side of a fold.

    Attributes:
        record: `test`, `differences`, `over_groups` and `calibration`, for JSON.
        scores: of each row and K.
        embedded: of each row of the model, embeddings of the test tiles in each context.
    """

    record: dict[str, Any]
    scores: Scores
    embedded: Mapping[str, Any]


def evaluate_fold(
    run: FoldRun, model: TransferModel, plain: TransferModel, before: TransferModel
) -> Tested:
    """Calibrate on the validation tiles, then score the test tiles: all rows, same episodes.

    Args:
        run: the fold.
        model: what was trained.
        plain: its rival without bridge.
        before: the model before phase 3.
    """
    fold, device = run.fold, run.engine.device
    fit, scale = run.recipe.training.fit, float(model.head.scale.item())
    seed = run.recipe.training.seed
    around = surroundings(
        model,
        fold.ct,
        run.data.ct,
        run.data.patients,
        paired=run.data.paired,
        seed=[seed, fold.number, TEST_CT],
        device=device,
    )
    val = score_rows(
        embed_rows(model, fold.val, around, seed, device), fold.val_episodes, scale, fit, seed
    )
    heat = temperatures(val)
    embedded = embed_rows(model, fold.test, around, seed, device)
    frozen = {"frozen_features": before, "untrained_encoder": new_model(fold, run.recipe)}
    rows = {
        **embedded,
        "protonet": [embed_tiles(plain, fold.test.tiles, None, device)],
        **frozen_rows(frozen, fold.test, fold.train, device),
    }
    scores = score_rows(rows, fold.test_episodes, scale, fit, seed)
    record = {
        "calibration": _calibration(run, val, heat, scale),
        "test": measure(scores, heat),
        "differences": differences(scores, fold.test, seed),
        "over_groups": over_groups(scores, fold.test, seed),
    }
    return Tested(record, scores, embedded)


def _calibration(
    run: FoldRun, val: Scores, found: Mapping[str, Mapping[int, float]], scale: float
) -> dict[str, Any]:
    """Record the temperatures, and whether the validation tiles speak for a CT context."""
    k = run.recipe.training.k_shot
    name = "with_ct" if "with_ct" in val else "without_ct"
    heat = found["without_ct"]
    at_bound = min(abs(heat[k] / bound - 1) for bound in TEMPERATURES) < 1e-6
    if at_bound:
        say(
            f"warning: fold {run.fold.number}: the temperature stopped at its bound, {heat[k]:g}: "
            f"probabilities are not calibrated; train longer or add validation patients"
        )
    gain = _ct_gain(run, val, k)
    return {
        "k_shot": k,
        "fit": run.recipe.training.fit,
        "learnt_scale": scale,
        "temperature": heat[k],
        "temperatures": {str(shots): value for shots, value in heat.items()},
        "at_bound": at_bound,
        "validation_tiles": len(run.fold.val),
        "temperatures_with_ct": {str(shots): value for shots, value in found[name].items()},
        "ece_before": metrics(val[name][k])["ece"],
        "ece_after": metrics(val[name][k], found[name][k])["ece"],
        "ct_gain": gain,
        "ct_context": run.data.paired and gain["low"] > 0,
    }


def _ct_gain(run: FoldRun, val: Scores, k: int) -> dict[str, float]:
    """What the CT adds to accuracy on validation tiles, with an interval over their groups.

    Episodes draw the same few tiles again and again: their own interval would be far too narrow.
    """
    if "with_ct" not in val:
        return {"mean": 0.0, "ci95": 0.0, "low": 0.0, "high": 0.0, "groups": 0}
    first, second = val["with_ct"][k], val["without_ct"][k]
    change = first.correct.astype(np.float64) - second.correct
    groups = run.fold.val.groups[first.queries]
    found = bootstrap_groups(change, groups, seed=run.recipe.training.seed)
    return {**found, "ci95": (found["high"] - found["low"]) / 2}
