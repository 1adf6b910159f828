"""Pretraining on images alone: two changed views of one image must find each other.

Volumes that are shapes have a second task: to tell the size, the surface and the thickness of the
view from its tokens, which nobody has to label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdt_runtime.errors import TrainingError
from cdt_train.augment3d import is_mask
from cdt_train.checkpoint import load_checkpoint, save_checkpoint
from cdt_train.encoders.backbones import Backbone
from cdt_train.engine import Engine
from cdt_train.loop import Run, Schedule, require_same_recipe, train_phase
from cdt_train.progress import say
from cdt_train.seeding import step_seed
from cdt_train.ssl import contrast
from cdt_train.supervised import Augmentation, BatchOrder

PRETRAINED = "ssl_backbone.pt"

STATISTICS = 6
"""How many figures `shape_statistics` gives."""


class ViewsPhase:
    """Contrast of two views, and for shapes their statistics.

    Args:
        backbone: trained in place.
        images: `(n, C, H, W)` or `(n, C, D, H, W)`, of the training split alone.
        order: of the batches.
        augmentation: makes the views.
        temperature: of the contrast.
        shape_weight: of the loss of the statistics; 0 leaves them out.
        seed: of every random number.
        device: where the model lives.

    Source: Chen et al. 2020 (SimCLR).
    """

    name = "pretraining"

    def __init__(
        self,
        backbone: Backbone,
        images: Tensor,
        *,
        order: BatchOrder,
        augmentation: Augmentation,
        temperature: float,
        shape_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        width = backbone.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = nn.Sequential(
                nn.BatchNorm1d(width), nn.Linear(width, 128), nn.BatchNorm1d(128, affine=False)
            )
            gauge = nn.Linear(width, STATISTICS)
        parts = {"backbone": backbone, "projector": projector}
        self.model: nn.Module = nn.ModuleDict(parts | ({"gauge": gauge} if shape_weight else {}))
        self.model.to(device)
        self._backbone, self._projector, self._gauge = backbone, projector, gauge
        self._images, self._order, self._augmentation = images, order, augmentation
        self._temperature, self._shape_weight = temperature, shape_weight
        self._seed, self._device = seed, device
        self._losses: list[float] = []

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Contrast the two views of one batch; `progress` is not used."""
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        images = self._images[self._order(index)]
        views = [self._augmentation(images, generator) for _ in range(2)]
        both = torch.cat(views).to(self._device)
        pooled = self._backbone.tokens(both).mean(dim=1)
        matching, accuracy = contrast(self._projector(pooled), self._temperature)
        loss, terms = matching, {"contrast": matching, "accuracy": accuracy}
        if self._shape_weight > 0:
            gauged = self._gauge(pooled.float())
            terms["shape"] = functional.smooth_l1_loss(gauged, shape_statistics(both))
            loss = loss + self._shape_weight * terms["shape"]
        self._losses.append(loss.item())
        return {"loss": loss, **terms}

    def validate(self) -> dict[str, float]:
        """Score the epoch by its training loss: nothing is held out."""
        score = -sum(self._losses) / max(1, len(self._losses))
        self._losses.clear()
        return {"score": score}


def shape_statistics(volumes: Tensor) -> Tensor:
    """Size, surface, thickness and the three spreads of shapes, standardised over the batch.

    Args:
        volumes: `(B, C, D, H, W)`, 0 outside.

    Returns:
        `(B, 6)`. Thickness is size over surface; the spreads are along the principal axes, so that
        no statistic changes where a shape is turned or mirrored.
    """
    with torch.autocast(volumes.device.type, enabled=False):  # no eigenvalues of bfloat16
        return _shape_statistics(volumes.float().mean(dim=1))


def _shape_statistics(shapes: Tensor) -> Tensor:
    size = shapes.sum(dim=(1, 2, 3)).clamp_min(1e-3)
    surface = torch.stack(
        [shapes.diff(dim=axis).abs().sum(dim=(1, 2, 3)) for axis in (1, 2, 3)]
    ).sum(dim=0)
    spreads = torch.linalg.eigvalsh(_covariance(shapes, size)).clamp_min(1e-6).sqrt()
    columns = [size.log(), surface.clamp_min(1e-3).log(), size / surface.clamp_min(1e-3)]
    found = torch.cat([torch.stack(columns, dim=1), spreads], dim=1)
    return (found - found.mean(dim=0)) / found.std(dim=0, correction=0).clamp_min(1e-6)


def _covariance(shapes: Tensor, size: Tensor) -> Tensor:
    """Second central moments of shapes `(B, D, H, W)`, in voxels; `(B, 3, 3)`."""
    axes = [torch.arange(side, device=shapes.device).float() for side in shapes.shape[1:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (V, 3)
    weights = shapes.flatten(1) / size[:, None]
    centres = weights @ places
    outer = (places[:, :, None] * places[:, None, :]).flatten(1)  # (V, 9)
    moments = (weights @ outer).view(-1, 3, 3)
    return moments - centres[:, :, None] * centres[:, None, :]


@dataclass(frozen=True)
class Pretraining:
    """The numbers of a pretraining on images alone.

    Attributes:
        epochs: over the training split.
        batch_size: images a step, two views of each.
        learning_rate: top of the cosine.
        weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises.
        temperature: of the contrast.
        shape_weight: of the loss of the statistics, for volumes that are shapes.
        seed: of every random number.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    temperature: float = 0.2
    shape_weight: float = 1.0
    seed: int = 0


def pretrain_views(
    images: Tensor,
    backbone: Backbone,
    settings: Pretraining,
    *,
    folder: Path,
    config: Mapping[str, Any],
    engine: Engine,
) -> dict[str, Tensor]:
    """Pretrain a backbone on images, or go on with a pretraining that was interrupted.

    Args:
        images: of the training split alone.
        backbone: trained in place.
        settings: all numbers.
        folder: of the checkpoints; a finished pretraining there is taken up.
        config: compared on resume, beside `settings`.
        engine: to train on.

    Returns:
        The weights of the backbone's network, also kept in `FOLDER/ssl_backbone.pt`.

    Raises:
        CheckpointError: the folder holds one with other settings.
        TrainingError: a loss is not finite, or there are fewer than two images.
    """
    recipe = {"pretraining": asdict(settings), **config}
    path = folder / PRETRAINED
    if path.is_file():
        content = load_checkpoint(path, ("model_state_dict", "config"))
        require_same_recipe(path, content["config"], recipe)
        say(f"pretraining: taken up from {path}")
        state: dict[str, Tensor] = content["model_state_dict"]
        return state
    if len(images) < 2:
        raise TrainingError(f"pretraining: {len(images)} training images: at least 2 are needed")
    mask = images.ndim == 5 and is_mask(images[:256])
    order = BatchOrder(len(images), settings.batch_size, settings.seed)
    phase = ViewsPhase(
        backbone,
        images,
        order=order,
        augmentation=Augmentation(mask=mask),
        temperature=settings.temperature,
        shape_weight=settings.shape_weight if mask else 0.0,
        seed=settings.seed,
        device=engine.device,
    )
    schedule = Schedule(
        settings.epochs,
        order.steps,
        settings.learning_rate,
        settings.weight_decay,
        settings.warmup,
        seed=settings.seed,
    )
    train_phase(phase, schedule, Run(folder, "ssl", recipe, keep=1, resume=True), engine)
    weights = {key: value.cpu().clone() for key, value in backbone.net.state_dict().items()}
    save_checkpoint(path, {"model_state_dict": weights, "config": recipe})
    return weights
