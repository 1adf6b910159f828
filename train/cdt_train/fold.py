"""One fold of a run: phase 2, calibration, and evaluation on patients that nothing has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_json
from cdt_train.config import Recipe
from cdt_train.data.arrays import TileArrays
from cdt_train.data.load import LoadedData
from cdt_train.engine import Engine
from cdt_train.episodes import Episode
from cdt_train.episodic import EpisodicPhase, embed_tiles
from cdt_train.evaluate import (
    TEMPERATURES,
    EpisodeScores,
    colour_statistics,
    fit_temperature,
    metrics,
    score_episodes,
)
from cdt_train.loop import Run, Schedule, train_phase
from cdt_train.models.transfer_model import TransferModel, build_model
from cdt_train.plots import plot_curves
from cdt_train.progress import say
from cdt_train.split import TEST_CT, Fold

EVAL_CONTEXTS = 4
"""Volumes that evaluation with CT draws from: each costs one pass over the test tiles."""

_PANELS = {
    "episode_loss": "loss of episodes",
    "val_loss": "loss of episodes",
    "accuracy": "accuracy of episodes",
    "val_accuracy": "accuracy of episodes",
    "domain_accuracy": "accuracy of the domain discriminator",
}


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
    history = _train(fold, ct_encoder, recipe, data, resume, engine)
    title = f"Fold {fold.number}: episodic training"
    if engine.is_main:
        plot_curves(fold.folder / "curves.png", title, history, _PANELS)
    best = load_checkpoint(best_path, ("model_state_dict", "best_metric", "epoch"))
    model = _new_model(fold, recipe)
    load_weights(model, best["model_state_dict"], best_path)
    model.to(engine.device)
    calibration = _calibrate(model, fold, recipe, engine.device)
    result = {
        "fold": fold.number,
        "tiles": {side: len(names) for side, names in fold.split.items()},
        "validation": {"epoch": best["epoch"], "best_metric": best["best_metric"]},
        "calibration": calibration,
        "gate": float(torch.tanh(model.bridge.gate).item()),
        "history": history,
        "test": evaluate_fold(model, fold, recipe, calibration["temperature"], engine.device),
    }
    if engine.is_main:
        content = {**best, "calibration": calibration, "test": result["test"]}
        save_checkpoint(best_path, content)
        write_json(record, result)
    return result


def _train(
    fold: Fold,
    ct_encoder: Mapping[str, Tensor],
    recipe: Recipe,
    data: LoadedData,
    resume: bool,
    engine: Engine,
) -> list[dict[str, float]]:
    training = recipe.training
    run = Run(
        fold.folder,
        "checkpoint",
        recipe.to_dict(),
        extra={
            "preprocess": data.preprocess.to_dict(),
            "dataset_info": {**data.info, "fold": fold.number, "split": fold.split},
        },
        keep=training.keep_checkpoints,
        resume=resume,
        best_path=fold.folder / "best_model.pt",
    )
    schedule = Schedule(
        training.num_epochs,
        training.episodes_per_epoch,
        training.learning_rate,
        training.weight_decay,
        training.warmup,
    )
    return train_phase(_phase(fold, ct_encoder, recipe, data, engine.device), schedule, run, engine)


def model_of(recipe: Recipe, channels: int, n_classes: int) -> TransferModel:
    """Build the model of a recipe for so many channels and classes, with seeded weights."""
    return build_model(
        channels=channels,
        n_classes=n_classes,
        image_size=recipe.data.image_size,
        windows=len(recipe.data.hu_windows),
        feature_dim=recipe.model.feature_dim,
        num_heads=recipe.model.attention_num_heads,
        path_widths=recipe.model.path_widths,
        ct_widths=recipe.model.ct_widths,
        seed=recipe.training.seed,
    )


def evaluate_fold(
    model: TransferModel, fold: Fold, recipe: Recipe, temperature: float, device: torch.device
) -> dict[str, Any]:
    """Score the test tiles: with CT, without, and the baselines, all on the same episodes."""
    episodes = fold.test_episodes
    scale = float(model.head.scale.item())
    alone = embed_tiles(model, fold.test.tiles, None, device)
    untrained = _new_model(fold, recipe)
    untrained.path_encoder.standardise_by(fold.train.tiles)
    rows: dict[str, EpisodeScores] = {
        "with_ct": _score_with_ct(
            model, fold, fold.test, episodes, scale, recipe.training.seed, device
        ),
        "without_ct": score_episodes(alone, episodes, scale),
        "untrained_encoder": score_episodes(
            embed_tiles(untrained, fold.test.tiles, None, torch.device("cpu")), episodes, 1.0
        ),
        "colour_statistics": score_episodes(
            colour_statistics(fold.test.tiles, fold.train.tiles), episodes, 1.0
        ),
    }
    calibrated = {"with_ct", "without_ct"}
    return {
        name: metrics(scores, temperature if name in calibrated else 1.0)
        for name, scores in rows.items()
    }


def _phase(
    fold: Fold,
    ct_encoder: Mapping[str, Tensor],
    recipe: Recipe,
    data: LoadedData,
    device: torch.device,
) -> EpisodicPhase:
    """Set up phase 2 from the pretrained CT encoder."""
    training = recipe.training
    model = _new_model(fold, recipe)
    load_weights(model.ct_encoder, ct_encoder, fold.folder / "ct_encoder_pretrained.pt")
    model.path_encoder.standardise_by(fold.train.tiles)
    model.path_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return EpisodicPhase(
        model,
        fold.train,
        fold.val,
        fold.ct,
        fold.sampler,
        fold.val_episodes,
        channel_dropout=recipe.data.channel_dropout if data.preprocess.fill_missing else 0.0,
        ct_dropout=training.ct_dropout,
        classifier_share=training.classifier_share,
        domain_weight=training.domain_weight,
        seed=training.seed * 100 + fold.number,
        device=device,
    )


def _new_model(fold: Fold, recipe: Recipe) -> TransferModel:
    return model_of(recipe, fold.train.tiles.shape[1], len(fold.train.classes))


def _calibrate(
    model: TransferModel, fold: Fold, recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """Fit one temperature on the validation patients, for answers with a CT and without."""
    scale = float(model.head.scale.item())
    alone = score_episodes(
        embed_tiles(model, fold.val.tiles, None, device), fold.val_episodes, scale
    )
    seed = recipe.training.seed
    with_ct = _score_with_ct(model, fold, fold.val, fold.val_episodes, scale, seed, device)
    scores = _together([alone, with_ct])
    temperature = fit_temperature(scores)
    at_bound = min(abs(temperature / bound - 1) for bound in TEMPERATURES) < 1e-6
    if at_bound:
        say(
            f"warning: fold {fold.number}: the temperature stopped at its bound, {temperature:g}: "
            f"probabilities are not calibrated; train longer or add validation patients"
        )
    return {
        "k_shot": recipe.training.k_shot,
        "learnt_scale": scale,
        "temperature": temperature,
        "at_bound": at_bound,
        "validation_tiles": len(fold.val),
        "ece_before": metrics(scores)["ece"],
        "ece_after": metrics(scores, temperature)["ece"],
    }


def _score_with_ct(
    model: TransferModel,
    fold: Fold,
    tiles: TileArrays,
    episodes: list[Episode],
    scale: float,
    seed: int,
    device: torch.device,
) -> EpisodeScores:
    """Score episodes that each see one CT, drawn at random from a few."""
    rng = np.random.default_rng([seed, fold.number, TEST_CT])
    chosen = rng.permutation(len(fold.ct))[:EVAL_CONTEXTS]
    parts = []
    for position, index in enumerate(chosen):
        ct = fold.ct.volumes[int(index) : int(index) + 1]
        embeddings = embed_tiles(model, tiles.tiles, ct, device)
        parts.append(score_episodes(embeddings, episodes[position :: len(chosen)], scale))
    return _together(parts)


def _together(parts: list[EpisodeScores]) -> EpisodeScores:
    return EpisodeScores(
        np.concatenate([part.accuracies for part in parts]),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.truth for part in parts]),
    )
