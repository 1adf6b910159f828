"""Phase 2 before classes: the tile encoder learns to know a tile in any view, without labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cdt_train.augment import TileAugmentation
from cdt_train.data.arrays import TileArrays
from cdt_train.models.transfer_model import TransferModel
from cdt_train.seeding import step_seed
from cdt_train.ssl import contrast

VIEW_TEMPERATURE = 0.2
PROJECTION = 64


class ViewPhase:
    """Two changed views of a tile must find each other among those of other groups.

    Tiles of one group are much alike; they never meet in a batch. What is learnt here holds for
    classes to come, and keeps the classifier that follows from learning a few tiles by heart.

    Args:
        model: its path encoder is trained in place.
        train: training tiles.
        augmentation: makes the views.
        batch_size: tiles a step, two views of each; fewer where there are fewer groups.
        seed: of every random number.
        device: where the model lives.

    Source: Chen et al. 2020 (SimCLR).
    """

    name = "phase 2 (views)"

    def __init__(
        self,
        model: TransferModel,
        train: TileArrays,
        *,
        augmentation: TileAugmentation,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._projector = view_projector(model.path_encoder.feature_dim)
        parts = {"path_encoder": model.path_encoder, "projector": self._projector}
        self.model: nn.Module = nn.ModuleDict(parts).to(device)
        self._encoder = model.path_encoder
        self._tiles = augmentation.shrink(train.tiles)
        self._groups = [np.flatnonzero(train.groups == group) for group in np.unique(train.groups)]
        self._augmentation, self._batch_size = augmentation, batch_size
        self._seed, self._device = seed, device
        self._losses: list[float] = []

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Contrast one batch of pairs of views; `progress` is not used."""
        rng = np.random.default_rng([self._seed, index])
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        drawn = rng.permutation(len(self._groups))[: self._batch_size]
        chosen = torch.from_numpy(np.array([rng.choice(self._groups[place]) for place in drawn]))
        tiles = self._tiles[chosen.repeat(2)].to(self._device)
        views = self._augmentation(tiles, generator).to(memory_format=torch.channels_last)
        projected = self._projector(self._encoder(views).mean(dim=1))
        loss, accuracy = contrast(projected, VIEW_TEMPERATURE)
        self._losses.append(loss.item())
        return {"loss": loss, "view_contrast": loss, "view_accuracy": accuracy}

    def validate(self) -> dict[str, float]:
        """Score the epoch by its training loss, as no label is known here."""
        score = -sum(self._losses) / len(self._losses)
        self._losses.clear()
        return {"score": score}


def view_projector(width: int) -> nn.Sequential:
    """What views are contrasted behind; it takes `(B, width)` and is not kept."""
    return nn.Sequential(
        nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, PROJECTION)
    )
