"""One fold of a run: phases 2 and 3, calibration, and tests on patients that nothing has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdt_train.augment import TileAugmentation
from cdt_train.calibration import TEMPERATURES
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_json
from cdt_train.config import Recipe
from cdt_train.contexts import Contexts
from cdt_train.data.arrays import RGB
from cdt_train.data.load import LoadedData
from cdt_train.embed import embed_tiles, tile_tokens
from cdt_train.engine import Engine
from cdt_train.episodic import EpisodeRecipe, EpisodicPhase
from cdt_train.fold_pictures import draw_fold
from cdt_train.intervals import bootstrap_groups
from cdt_train.loop import Run, Schedule, train_phase
from cdt_train.metrics import metrics
from cdt_train.models.transfer_model import TransferModel, build_model
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
from cdt_train.tile_phase import TilePhase
from cdt_train.tile_views import ViewPhase

GATE_RATE, UNPAIRED_GATE_RATE = 10.0, 0.1
"""Of the learning rate, for the bridge's gate. It starts closed and is a single number: where CT
and tiles are paired it must move fast to open at all. Unpaired it has nothing to open for, and what
noise moved it to, 0.01, cost 0.3 points."""

SETTLING_CONTEXTS, SETTLING_TILES = 8, 256
"""Volumes and tiles, at most, that the mean of the bridge's residual is taken over."""

History = list[dict[str, float]]

TILE_ENCODER = "tile_encoder.pt"
PROTONET = "protonet.pt"


@dataclass(frozen=True, eq=False)
class FoldRun:
    """What the steps of one fold share."""

    fold: Fold
    recipe: Recipe
    data: LoadedData
    engine: Engine
    resume: bool

    @property
    def seed(self) -> int:
        """Seed of the fold's training."""
        return self.recipe.training.seed * 100 + self.fold.number


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
    learnt, features = _train_tiles(run)
    before = _started(run, features, ct_encoder)
    plain = _train_protonet(run, features, ct_encoder)
    history = _train_episodes(run, features, ct_encoder)
    best = load_checkpoint(best_path, ("model_state_dict", "best_metric", "epoch"))
    model = new_model(fold, recipe)
    load_weights(model, best["model_state_dict"], best_path)
    _settle(run, model)
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


def model_of(recipe: Recipe, channels: int, n_classes: int) -> TransferModel:
    """Build the model of a recipe for so many channels and classes, with seeded weights."""
    return build_model(
        channels=channels,
        n_classes=n_classes,
        windows=len(recipe.data.hu_windows),
        feature_dim=recipe.model.feature_dim,
        num_heads=recipe.model.attention_num_heads,
        path_widths=recipe.model.path_widths,
        ct_widths=recipe.model.ct_widths,
        bank_size=recipe.model.bank_size,
        seed=recipe.training.seed,
    )


def new_model(fold: Fold, recipe: Recipe) -> TransferModel:
    """Build the fold's model as it is before any training."""
    model = model_of(recipe, fold.train.tiles.shape[1], len(fold.train.classes))
    model.path_encoder.standardise_by(fold.train.tiles)
    model.path_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


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


def _train_tiles(run: FoldRun) -> tuple[dict[str, History], dict[str, Tensor]]:
    """Phase 2; returns its histories and the weights of the tile encoder and the classifier."""
    training, path = run.recipe.training, run.fold.folder / TILE_ENCODER
    model = new_model(run.fold, run.recipe)
    if run.resume and path.is_file():
        found = load_checkpoint(path, ("model_state_dict", "history"))
        return dict(found["history"]), dict(found["model_state_dict"])
    history: dict[str, History] = {"views": _view_tiles(run, model), "tiles": []}
    if training.encoder_epochs:
        phase = TilePhase(
            model,
            run.fold.train,
            run.fold.val,
            run.fold.val_episodes[training.k_shot],
            augmentation=_augmentation(run),
            batch_size=training.encoder_batch_size,
            cutmix=training.cutmix,
            supcon_weight=training.supcon_weight,
            view_weight=training.view_weight,
            seed=run.seed,
            device=run.engine.device,
        )
        schedule = _encoder_schedule(run, training.encoder_epochs)
        history["tiles"] = train_phase(phase, schedule, _saved(run, "tiles", None), run.engine)
    kept = ("path_encoder.", "classifier.")
    state = {
        name: value.cpu().clone()
        for name, value in model.state_dict().items()
        if name.startswith(kept)
    }
    if run.engine.is_main:
        save_checkpoint(path, {"model_state_dict": state, "history": history})
    run.engine.wait()
    return history, state


def _view_tiles(run: FoldRun, model: TransferModel) -> History:
    """Phase 2 before classes: the tile encoder learns to know a tile in any view."""
    training = run.recipe.training
    if not training.view_epochs:
        return []
    phase = ViewPhase(
        model,
        run.fold.train,
        augmentation=_augmentation(run, training.view_size),
        batch_size=training.view_batch_size,
        seed=run.seed,
        device=run.engine.device,
    )
    schedule = _encoder_schedule(run, training.view_epochs)
    return train_phase(phase, schedule, _saved(run, "views", None), run.engine)


def _train_protonet(
    run: FoldRun, features: Mapping[str, Tensor], ct_encoder: Mapping[str, Tensor]
) -> TransferModel:
    """Train the rival: episodes from the same tile encoder, without CT, bridge and alignment."""
    best_path = run.fold.folder / PROTONET
    model = _started(run, features, ct_encoder)
    alone = EpisodeRecipe(
        ct_share=0.0,
        bank_share=0.0,
        proxy_weight=run.recipe.training.proxy_weight,
        domain_method="none",
    )
    phase = _episodes(run, model, alone, "ProtoNet, no bridge")
    training = run.recipe.training
    schedule = _schedule(run, training.num_epochs, training.episodes_per_epoch)
    train_phase(phase, schedule, _saved(run, "protonet", best_path), run.engine)
    best = load_checkpoint(best_path, ("model_state_dict",))
    load_weights(model, best["model_state_dict"], best_path)
    _settle(run, model)
    return model


def _settle(run: FoldRun, model: TransferModel) -> None:
    """Fix the centre and the axes of the embedding by the training tiles as inference sees them."""
    train, device = run.fold.train, run.engine.device
    tokens = tile_tokens(model.to(device), train.tiles, device)
    labels = torch.from_numpy(train.labels).to(device)
    model.bridge.centre.settle(tokens.mean(dim=1), labels, run.recipe.training.off_axis)
    some = run.fold.ct.take(range(min(len(run.fold.ct), SETTLING_CONTEXTS)))
    contexts = Contexts.encode(model.ct_encoder, some, (), device)
    if len(contexts):
        model.bridge.settle(tokens[:: -(-len(tokens) // SETTLING_TILES)], contexts.tokens)


def _train_episodes(
    run: FoldRun, features: Mapping[str, Tensor], ct_encoder: Mapping[str, Tensor]
) -> list[dict[str, float]]:
    """Phase 3; its best epoch is kept as `best_model.pt`."""
    training = run.recipe.training
    recipe = EpisodeRecipe(
        ct_share=training.ct_share,
        bank_share=training.bank_share,
        proxy_weight=training.proxy_weight,
        agreement_weight=training.agreement_weight,
        domain_method=training.domain_method,
        domain_weight=training.domain_weight,
    )
    model = _started(run, features, ct_encoder)
    phase = _episodes(run, model, recipe, "phase 3 (episodes)", with_ct=run.data.paired)
    schedule = _schedule(run, training.num_epochs, training.episodes_per_epoch)
    best_path = run.fold.folder / "best_model.pt"
    return train_phase(phase, schedule, _saved(run, "checkpoint", best_path), run.engine)


def _started(
    run: FoldRun, features: Mapping[str, Tensor], ct_encoder: Mapping[str, Tensor]
) -> TransferModel:
    """Build the model with what phases 1 and 2 taught its encoders."""
    model = new_model(run.fold, run.recipe)
    load_weights(model.ct_encoder, ct_encoder, run.fold.folder / "ct_encoder_pretrained.pt")
    load_weights(model, {**model.state_dict(), **features}, run.fold.folder / TILE_ENCODER)
    return model


def _episodes(
    run: FoldRun,
    model: TransferModel,
    recipe: EpisodeRecipe,
    name: str,
    *,
    with_ct: bool = False,
) -> EpisodicPhase:
    fold, device = run.fold, run.engine.device
    model.to(device)
    patients = run.data.patients
    contexts = Contexts.encode(model.ct_encoder, fold.ct, patients, device)
    everyone = Contexts.encode(model.ct_encoder, run.data.ct, patients, device) if with_ct else None
    return EpisodicPhase(
        model,
        fold.train,
        fold.val,
        contexts,
        fold.sampler,
        fold.val_episodes[run.recipe.training.k_shot],
        augmentation=_augmentation(run),
        recipe=recipe,
        seed=run.seed,
        device=device,
        name=name,
        val_contexts=everyone,
    )


def _augmentation(run: FoldRun, size: int | None = None) -> TileAugmentation:
    training, preprocess = run.recipe.training, run.data.preprocess
    return TileAugmentation(
        size=size or training.training_size(run.recipe.data.image_size),
        min_crop=training.min_crop,
        rgb=preprocess.channels == RGB,
        stain_jitter=training.stain_jitter,
        stain_mix=training.stain_mix,
        gray=training.gray,
        channel_dropout=run.recipe.data.channel_dropout if preprocess.fill_missing else 0.0,
        blur=training.blur,
    )


def _schedule(run: FoldRun, epochs: int, steps: int) -> Schedule:
    training = run.recipe.training
    return Schedule(
        epochs,
        steps,
        training.learning_rate,
        training.weight_decay,
        training.warmup,
        schedule=training.schedule,
        patience=training.patience,
        ema_decay=training.ema_decay,
        groups=_rates(training.encoder_rate, GATE_RATE if run.data.paired else UNPAIRED_GATE_RATE),
        seed=run.seed,
    )


def _encoder_schedule(run: FoldRun, epochs: int) -> Schedule:
    training = run.recipe.training
    return replace(
        _schedule(run, epochs, training.encoder_steps),
        learning_rate=training.encoder_learning_rate,
        groups=None,
    )


def _rates(encoder_rate: float, gate_rate: float) -> Any:
    """Factor of the learning rate by name: phase 3 leaves the CT encoder as it is."""

    def factor(name: str) -> float:
        if name.startswith("ct_encoder."):
            return 0.0
        if name == "bridge.gate":
            return gate_rate
        return encoder_rate if name.startswith("path_encoder.") else 1.0

    return factor


def _saved(run: FoldRun, prefix: str, best_path: Any) -> Run:
    info = {**run.data.info, "fold": run.fold.number, "split": run.fold.split}
    return Run(
        run.fold.folder,
        prefix,
        run.recipe.to_dict(),
        extra={"preprocess": run.data.preprocess.to_dict(), "dataset_info": info},
        keep=run.recipe.training.keep_checkpoints,
        resume=run.resume,
        best_path=best_path,
    )
