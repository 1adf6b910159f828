"""One fold of a run: phase 2, calibration, and evaluation on patients that nothing has seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_runtime.preprocess import Preprocess
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint
from cdt_train.config import Recipe
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.episodes import Episode, EpisodeSampler, hold_out_groups
from cdt_train.episodic import EpisodicPhase, embed_tiles
from cdt_train.evaluate import (
    EpisodeScores,
    colour_statistics,
    draw_episodes,
    fit_temperature,
    metrics,
    score_episodes,
)
from cdt_train.loop import Run, Schedule, train_phase
from cdt_train.models.transfer_model import TransferModel, build_model
from cdt_train.plots import plot_curves
from cdt_train.progress import say

EVAL_CONTEXTS = 4
"""Volumes that evaluation with CT draws from: each costs one pass over the test tiles."""

_PANELS = {
    "episode_loss": "loss of episodes",
    "val_loss": "loss of episodes",
    "accuracy": "accuracy of episodes",
    "val_accuracy": "accuracy of episodes",
    "domain_accuracy": "accuracy of the domain discriminator",
}


@dataclass(frozen=True, eq=False)
class Fold:
    """The data of one fold.

    Attributes:
        number: from 1.
        folder: where the fold is written.
        train: tiles that weights are fitted to.
        val: tiles of other patients, for the choice of the epoch and for calibration.
        test: tiles of yet other patients, for evaluation alone.
        ct: volumes that training may see: none of a patient in `val` or `test`.
    """

    number: int
    folder: Path
    train: TileArrays
    val: TileArrays
    test: TileArrays
    ct: CtArrays

    @classmethod
    def part(
        cls,
        number: int,
        folder: Path,
        recipe: Recipe,
        tiles: TileArrays,
        test: NDArray[np.int64],
        patients: tuple[str, ...],
        ct: CtArrays,
    ) -> Fold:
        """Part the tiles outside the test fold into training and validation, by patient."""
        rest = np.setdiff1d(np.arange(len(tiles)), test)
        outside = tiles.take(rest)
        rng = np.random.default_rng([recipe.training.seed, number])
        share = recipe.training.val_share
        train, val = hold_out_groups(outside.labels, outside.groups, share, rng)
        held = {patients[g] for g in np.unique(tiles.groups[np.concatenate([rest[val], test])])}
        return cls(
            number,
            folder,
            outside.take(train),
            outside.take(val),
            tiles.take(test),
            ct.without(held),
        )


def train_fold(
    fold: Fold,
    ct_encoder: Mapping[str, Tensor],
    recipe: Recipe,
    preprocess: Preprocess,
    dataset_info: Mapping[str, Any],
    resume: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Train, calibrate and evaluate one fold; a finished one is taken up on resume.

    Returns:
        What `fold_N/metrics.json` holds.
    """
    record = fold.folder / "metrics.json"
    if resume and record.is_file():
        done: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return done
    say(
        f"fold {fold.number}: {len(fold.train)} training, {len(fold.val)} validation and "
        f"{len(fold.test)} test tiles, all of different {dataset_info['grouped_by']}s"
    )
    best_path = fold.folder / "best_model.pt"
    phase, episodes = _phase(fold, ct_encoder, recipe, device)
    training = recipe.training
    split = {name: list(getattr(fold, name).names) for name in ("train", "val", "test")}
    run = Run(
        fold.folder,
        "checkpoint",
        recipe.to_dict(),
        extra={
            "preprocess": preprocess.to_dict(),
            "dataset_info": {**dataset_info, "fold": fold.number, "split": split},
        },
        keep=training.keep_checkpoints,
        resume=resume,
        best_path=best_path,
    )
    schedule = Schedule(
        training.num_epochs,
        training.episodes_per_epoch,
        training.learning_rate,
        training.weight_decay,
        training.warmup,
    )
    history = train_phase(phase, schedule, run)
    plot_curves(
        fold.folder / "curves.png", f"Fold {fold.number}: episodic training", history, _PANELS
    )
    best = load_checkpoint(best_path, ("model_state_dict", "best_metric", "epoch"))
    model = _new_model(fold, recipe)
    load_weights(model, best["model_state_dict"], best_path)
    model.to(device)
    calibration = _calibrate(model, fold.val, episodes, recipe, device)
    result = {
        "fold": fold.number,
        "tiles": {name: len(names) for name, names in split.items()},
        "validation": {"epoch": best["epoch"], "best_metric": best["best_metric"]},
        "calibration": calibration,
        "history": history,
        "test": evaluate_fold(model, fold, recipe, calibration["temperature"], device),
    }
    save_checkpoint(best_path, {**best, "calibration": calibration, "test": result["test"]})
    record.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


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
    training = recipe.training
    sampler = _sampler(fold.test, recipe, training.test_queries)
    seed = [training.seed, fold.number, 2]
    episodes = draw_episodes(sampler, training.test_episodes, seed)
    scale = float(model.head.scale.item())
    alone = embed_tiles(model, fold.test.tiles, None, device)
    untrained = _new_model(fold, recipe)
    untrained.path_encoder.standardise_by(fold.train.tiles)
    rows: dict[str, EpisodeScores] = {
        "with_ct": _score_with_ct(model, fold, episodes, scale, seed, device),
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
    fold: Fold, ct_encoder: Mapping[str, Tensor], recipe: Recipe, device: torch.device
) -> tuple[EpisodicPhase, list[Episode]]:
    """Set up phase 2 from the pretrained CT encoder; also its validation episodes."""
    training = recipe.training
    model = _new_model(fold, recipe)
    load_weights(model.ct_encoder, ct_encoder, fold.folder / "ct_encoder_pretrained.pt")
    model.path_encoder.standardise_by(fold.train.tiles)
    model.path_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    val_sampler = _sampler(fold.val, recipe, training.test_queries)
    seed = [training.seed, fold.number, 1]
    episodes = draw_episodes(val_sampler, training.val_episodes, seed)
    phase = EpisodicPhase(
        model,
        fold.train,
        fold.val,
        fold.ct,
        _sampler(fold.train, recipe, training.n_query),
        episodes,
        channel_dropout=recipe.data.channel_dropout,
        ct_dropout=training.ct_dropout,
        domain_weight=training.domain_weight,
        classifier_share=training.classifier_share,
        seed=training.seed * 100 + fold.number,
        device=device,
    )
    return phase, episodes


def _new_model(fold: Fold, recipe: Recipe) -> TransferModel:
    return model_of(recipe, fold.train.tiles.shape[1], len(fold.train.classes))


def _sampler(tiles: TileArrays, recipe: Recipe, n_query: int) -> EpisodeSampler:
    return EpisodeSampler(
        tiles.labels,
        tiles.groups,
        tiles.classes,
        n_way=recipe.training.n_way,
        k_shot=recipe.training.k_shot,
        n_query=n_query,
    )


def _calibrate(
    model: TransferModel,
    val: TileArrays,
    episodes: list[Episode],
    recipe: Recipe,
    device: torch.device,
) -> dict[str, Any]:
    """Fit the temperature on the validation patients."""
    scale = float(model.head.scale.item())
    scores = score_episodes(embed_tiles(model, val.tiles, None, device), episodes, scale)
    temperature = fit_temperature(scores)
    return {
        "k_shot": recipe.training.k_shot,
        "learnt_scale": scale,
        "temperature": temperature,
        "ece_before": metrics(scores)["ece"],
        "ece_after": metrics(scores, temperature)["ece"],
    }


def _score_with_ct(
    model: TransferModel,
    fold: Fold,
    episodes: list[Episode],
    scale: float,
    seed: list[int],
    device: torch.device,
) -> EpisodeScores:
    """Score episodes that each see one CT, drawn at random from a few."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(fold.ct))[:EVAL_CONTEXTS]
    parts = []
    for position, index in enumerate(chosen):
        ct = fold.ct.volumes[int(index) : int(index) + 1]
        embeddings = embed_tiles(model, fold.test.tiles, ct, device)
        parts.append(score_episodes(embeddings, episodes[position :: len(chosen)], scale))
    return EpisodeScores(
        np.concatenate([part.accuracies for part in parts]),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.truth for part in parts]),
    )
