"""Supervised training: the model, its phase for the loop, and what it predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional

from cdt_train.augment import TileAugmentation
from cdt_train.augment3d import augment_volumes, mirrored_views, unit_range
from cdt_train.encoders.backbones import Backbone
from cdt_train.seeding import step_seed
from cdt_train.supervised_metrics import Task, supervised_metrics

BATCH = 64


class SupervisedModel(nn.Module):
    """Backbone, perhaps the transfer module, token mean, linear.

    Args:
        backbone: images to tokens.
        outputs: number of logits.
        adapter: what stands between tokens and their mean, or None.
        frozen: keep the backbone as it is, its running statistics too. Without an adapter the
            token means are then standardised over the batch, so that a backbone of any scale suits
            one learning rate; one that learns finds its own scale.
    """

    def __init__(
        self, backbone: Backbone, outputs: int, adapter: nn.Module | None, *, frozen: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter or nn.Identity()
        probe = frozen and adapter is None
        self.norm = nn.BatchNorm1d(backbone.width, affine=False) if probe else nn.Identity()
        self.head = nn.Linear(backbone.width, outputs)
        nn.init.zeros_(self.head.weight)  # the first steps are spent on signal, not on noise
        nn.init.zeros_(self.head.bias)
        self.frozen = False
        self.freeze(frozen)

    def freeze(self, frozen: bool) -> None:
        """Stop the backbone from learning, or let it learn again."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> SupervisedModel:
        """Set the mode of every part; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `(B, C, ...)` float, 0 to 1; logits `(B, K)`."""
        tokens = self.adapter(self.backbone.tokens(images))
        logits: Tensor = self.head(self.norm(tokens.mean(dim=1)))
        return logits


@dataclass(frozen=True, eq=False)
class Examples:
    """Images and what they are.

    Attributes:
        images: `(n, C, H, W)` or `(n, C, D, H, W)`, uint8 in 0 to 255 or float.
        targets: `(n,)` int64, or `(n, L)` float32.
    """

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed.

    Attributes:
        mask: volumes are shapes: their intensities stay.
        off: change nothing.
    """

    mask: bool = False
    off: bool = False

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Change a batch; float32, uint8 came to 0 to 1."""
        if self.off:
            return unit_range(images)
        if images.ndim == 5:
            return augment_volumes(images, mask=self.mask, generator=generator)
        tiles = TileAugmentation(
            size=images.shape[-1],
            min_crop=0.6,
            rgb=images.shape[1] == 3,
            stain_jitter=0.2,
            channel_dropout=0.0,
            blur=0.1,
        )
        return tiles(images, generator)


class BatchOrder:
    """Which items each step sees: every epoch each item once, in an order of its own.

    Args:
        count: of items.
        batch_size: of a step; the few items that fill no batch wait for another epoch.
        seed: of the orders.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.batch_size = min(count, batch_size)
        self.steps = count // self.batch_size
        self._count, self._seed = count, seed

    def __call__(self, index: int) -> Tensor:
        """Return the items of the step with that index."""
        epoch, place = divmod(index, self.steps)
        generator = torch.Generator().manual_seed(step_seed(self._seed, epoch))
        order = torch.randperm(self._count, generator=generator)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class SupervisedPhase:
    """Each step fits one batch of augmented training images.

    Args:
        name: for messages.
        model: trained in place.
        train: what it learns from.
        val: what chooses the epoch, or None: then the score is the training loss.
        task: binary has one logit, multilabel one a label.
        order: of the batches.
        augmentation: of training images.
        class_weights: `(K,)` or None.
        label_smoothing: of a multi-class loss.
        seed: of every random number.
        device: where the model lives.
    """

    def __init__(
        self,
        name: str,
        model: SupervisedModel,
        train: Examples,
        val: Examples | None,
        *,
        task: Task,
        order: BatchOrder,
        augmentation: Augmentation,
        class_weights: Tensor | None,
        label_smoothing: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.name = name
        self.model: nn.Module = model.to(device)
        self._train, self._val, self._task, self._order = train, val, task, order
        self._augmentation = augmentation
        self._weights = None if class_weights is None else class_weights.to(device)
        self._smoothing, self._seed, self._device = label_smoothing, seed, device
        self._losses: list[float] = []

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Fit one batch; `progress` is not used."""
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        chosen = self._order(index)
        images = self._augmentation(self._train.images[chosen], generator).to(self._device)
        targets = self._train.targets[chosen].to(self._device)
        loss = self._loss(self.model(images), targets)
        self._losses.append(loss.item())
        return {"loss": loss}

    def validate(self) -> dict[str, float]:
        """Score by the AUC on `val`, or by the training loss where there is none."""
        trained = sum(self._losses) / max(1, len(self._losses))
        self._losses.clear()
        if self._val is None:
            return {"score": -trained}
        logits = predict_logits(self.model, self._val.images, self._device, tta=False)
        with torch.no_grad():
            loss = self._loss(logits, self._val.targets.to(self._device)).item()
        truth = self._val.targets.numpy()
        found = supervised_metrics(chances_of(logits, self._task), truth, self._task)
        score = -loss if np.isnan(found["auc"]) else found["auc"]
        return {"score": score, "val_auc": score, "val_accuracy": found["accuracy"]} | {
            "val_loss": loss
        }

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self._task == "multiclass":
            return functional.cross_entropy(
                logits, targets, weight=self._weights, label_smoothing=self._smoothing
            )
        if self._task == "multilabel":
            return functional.binary_cross_entropy_with_logits(
                logits, targets.float(), pos_weight=self._weights
            )
        each = None if self._weights is None else self._weights[targets]
        return functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float(), each)


def output_count(task: Task, classes: int) -> int:
    """Return how many logits a task has: one for two classes, else one a class."""
    return 1 if task == "binary" else classes


def balancing_weights(targets: Tensor, task: Task, classes: int) -> Tensor:
    """Weights that let every class count alike: their mean over the items is 1.

    For multi-label data the weight of a label where it is present against where it is absent.
    """
    if task == "multilabel":
        present = targets.float().mean(dim=0).clamp(1e-3, 1 - 1e-3)
        return (1 - present) / present
    counts = torch.bincount(targets, minlength=classes).clamp_min(1).float()
    return len(targets) / (classes * counts)


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device, *, tta: bool) -> Tensor:
    """Classify many images; `(n, K)` logits.

    Args:
        model: put into evaluation mode.
        images: as `Examples` holds them.
        device: where the model lives.
        tta: average over all mirrored views, in the space of logits.
    """
    model.eval()
    parts = []
    for batch in torch.split(images, BATCH):
        unit = unit_range(batch).to(device)
        views = mirrored_views(unit) if tta else [unit]
        parts.append(torch.stack([model(view) for view in views]).mean(dim=0))
    return torch.cat(parts).float()


def chances_of(logits: Tensor, task: Task) -> NDArray[np.float64]:
    """Bring logits to probabilities, `(n, K)` with K = 2 for a binary task."""
    wide = logits.detach().cpu().double()
    if task == "multiclass":
        found: NDArray[np.float64] = wide.softmax(dim=1).numpy()
        return found
    chances = wide.sigmoid()
    if task == "binary":
        chances = torch.cat([1 - chances, chances], dim=1)
    return np.asarray(chances.numpy(), dtype=np.float64)
