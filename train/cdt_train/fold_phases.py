"""Phases 2 and 3 of one fold, and the rival that has no bridge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cdt_train.augment import TileAugmentation
from cdt_train.checkpoint import load_checkpoint, load_weights, save_checkpoint
from cdt_train.config import Recipe
from cdt_train.contexts import Contexts
from cdt_train.data.arrays import RGB
from cdt_train.data.load import LoadedData
from cdt_train.embed import tile_tokens
from cdt_train.encoders.chosen import chosen_path_encoder, feature_shapes
from cdt_train.engine import Engine
from cdt_train.episodic import EpisodeRecipe, EpisodicPhase
from cdt_train.loop import Run, Schedule, train_phase
from cdt_train.models.transfer_model import TransferModel, build_model
from cdt_train.split import Fold
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


def model_of(recipe: Recipe, channels: int, n_classes: int) -> TransferModel:
    """Build the model of a recipe for so many channels and classes, with seeded weights."""
    path_encoder = chosen_path_encoder(recipe.model, channels, recipe.training.seed)
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
        path_encoder=path_encoder,
        **feature_shapes(recipe.model),
    )


def new_model(fold: Fold, recipe: Recipe) -> TransferModel:
    """Build the fold's model as it is before any training."""
    model = model_of(recipe, fold.train.tiles.shape[1], len(fold.train.classes))
    model.path_encoder.standardise_by(fold.train.tiles)
    model.path_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def train_tiles(run: FoldRun) -> tuple[dict[str, History], dict[str, Tensor]]:
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


def train_protonet(
    run: FoldRun, features: Mapping[str, Tensor], ct_encoder: Mapping[str, Tensor]
) -> TransferModel:
    """Train the rival: episodes from the same tile encoder, without CT, bridge and alignment."""
    best_path = run.fold.folder / PROTONET
    model = started(run, features, ct_encoder)
    alone = EpisodeRecipe(
        ct_share=0.0,
        bank_share=0.0,
        proxy_weight=run.recipe.training.proxy_weight,
        domain_method="none",
        silence=1.0,
    )
    phase = _episodes(run, model, alone, "ProtoNet, no bridge")
    training = run.recipe.training
    schedule = _schedule(run, training.num_epochs, training.episodes_per_epoch)
    train_phase(phase, schedule, _saved(run, "protonet", best_path), run.engine)
    best = load_checkpoint(best_path, ("model_state_dict",))
    load_weights(model, best["model_state_dict"], best_path)
    settle(run, model)
    return model


def settle(run: FoldRun, model: TransferModel) -> None:
    """Fix the centre and the axes of the embedding by the training tiles as inference sees them."""
    train, device = run.fold.train, run.engine.device
    tokens = tile_tokens(model.to(device), train.tiles, device, train.features)
    labels = torch.from_numpy(train.labels).to(device)
    own = model.bridge.of_tile(tokens).mean(dim=1)
    model.bridge.centre.settle(own, labels, run.recipe.training.off_axis)
    some = run.fold.ct.take(range(min(len(run.fold.ct), SETTLING_CONTEXTS)))
    contexts = Contexts.encode(model, some, (), device)
    if len(contexts):
        with torch.no_grad():
            volumes = contexts.of(torch.arange(len(contexts), device=device))
        model.bridge.settle(tokens[:: -(-len(tokens) // SETTLING_TILES)], volumes)


def train_episodes(
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
        silence=training.encoder_silence,
    )
    model = started(run, features, ct_encoder)
    phase = _episodes(run, model, recipe, "phase 3 (episodes)", with_ct=run.data.paired)
    schedule = _schedule(run, training.num_epochs, training.episodes_per_epoch)
    best_path = run.fold.folder / "best_model.pt"
    return train_phase(phase, schedule, _saved(run, "checkpoint", best_path), run.engine)


def started(
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
    contexts = Contexts.encode(model, fold.ct, patients, device)
    everyone = Contexts.encode(model, run.data.ct, patients, device) if with_ct else None
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
        groups=_rates(training.encoder_rate, _gate_rate(run)),
        seed=run.seed,
    )


def _encoder_schedule(run: FoldRun, epochs: int) -> Schedule:
    training = run.recipe.training
    return replace(
        _schedule(run, epochs, training.encoder_steps),
        learning_rate=training.encoder_learning_rate,
        groups=None,
    )


def _gate_rate(run: FoldRun) -> float:
    """Fast where there is something to open for: the patient's own CT, or a foundation encoder."""
    return GATE_RATE if run.data.paired or run.data.tiles.features else UNPAIRED_GATE_RATE


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
