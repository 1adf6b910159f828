"""Phase 1 as part of a run: pretrain the CT encoder, or take up a finished one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint
from cdt_train.config import Recipe
from cdt_train.data.arrays import CtArrays
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.encoders.weights import read_weights
from cdt_train.engine import Engine
from cdt_train.loop import Run, Schedule, require_same_recipe, train_phase
from cdt_train.plots import plot_curves
from cdt_train.progress import say
from cdt_train.ssl import CtPhase

PRETRAINED = "ct_encoder_pretrained.pt"

PANELS = {
    "contrast_cubes": "contrastive loss",
    "contrast_views": "contrastive loss",
    "accuracy_cubes": "accuracy of matching views",
    "accuracy_views": "accuracy of matching views",
    "position_cubes": "error of relative position",
    "position_views": "error of relative position",
}


def pretrain(
    recipe: Recipe,
    ct: CtArrays,
    folder: Path,
    resume: bool,
    engine: Engine,
    dataset_info: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Pretrain the CT encoder, or take up weights that the recipe names; keep it in `folder`.

    Args:
        recipe: of the run.
        ct: the volumes that it may see.
        folder: gets `ct_encoder_pretrained.pt` and the curves.
        resume: take up a finished or half-finished phase.
        engine: to train on.
        dataset_info: recorded in the checkpoint.

    Returns:
        The encoder's weights.

    Raises:
        CheckpointError: the weights that the recipe names can't be read, or fit another encoder.
    """
    path, config = folder / PRETRAINED, recipe.to_dict()
    if resume and path.is_file():
        found = load_checkpoint(path, ("model_state_dict", "config"))
        require_same_recipe(path, found["config"], config)
        state: dict[str, Tensor] = found["model_state_dict"]
        return state
    training = recipe.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        encoder = CtEncoder(
            len(recipe.data.hu_windows), recipe.model.ct_widths, recipe.model.feature_dim
        )
    history: list[dict[str, float]] = []
    if recipe.model.ct_encoder is not None:
        given = Path(recipe.model.ct_encoder)
        load_weights(encoder, read_weights(given), given)
        say(f"phase 1: left out, the CT encoder is that of {given}")
    elif training.ssl_epochs > 0 and len(ct) >= 2:
        say(f"phase 1: contrast and relative position on {len(ct)} CT series")
        phase = CtPhase(
            encoder,
            ct.volumes,
            ct.fine,
            windows=recipe.data.hu_windows,
            batch_size=training.ssl_batch_size,
            temperature=training.ssl_temperature,
            contrast_weight=training.ssl_contrast_weight,
            position_weight=training.ssl_position_weight,
            seed=training.seed,
            device=engine.device,
        )
        schedule = Schedule(
            training.ssl_epochs,
            training.ssl_steps,
            training.ssl_learning_rate,
            training.weight_decay,
            training.warmup,
            seed=training.seed,
        )
        run = Run(folder, "ssl", config, keep=training.keep_checkpoints, resume=resume)
        history = train_phase(phase, schedule, run, engine)
        if engine.is_main:
            plot_curves(folder / "curves_ssl.png", "Phase 1: CT pretraining", history, PANELS)
    else:
        say(f"phase 1: left out ({len(ct)} CT series, training.ssl_epochs={training.ssl_epochs})")
    state = {key: value.cpu().clone() for key, value in encoder.state_dict().items()}
    content = {
        "model_state_dict": state,
        "ssl_history": history,
        "config": config,
        "dataset_info": dict(dataset_info),
    }
    if engine.is_main:
        save_checkpoint(path, content)
    return state
