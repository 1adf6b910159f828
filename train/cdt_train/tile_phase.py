"""Phase 2: the tile encoder learns the training classes."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.augment import TileAugmentation
from cdt_train.data.arrays import TileArrays
from cdt_train.embed import embed_tiles
from cdt_train.episodes import Episode
from cdt_train.models.transfer_model import TransferModel
from cdt_train.scores import score_episodes
from cdt_train.seeding import step_seed
from cdt_train.ssl import contrast
from cdt_train.tile_views import PROJECTION, VIEW_TEMPERATURE, view_projector

LABEL_SMOOTHING = 0.1
SUPCON_TEMPERATURE = 0.1


class TilePhase:
    """Batches of all classes alike, at most one tile of a group while groups suffice.

    Episodes alone teach a fresh encoder next to nothing; a classifier does, and the contrast of
    classes gathers them. The contrast of two views of each tile knows no class: it keeps features
    that the training classes do not need and classes to come may.

    Args:
        model: its path encoder and classifier are trained in place.
        train: training tiles.
        val: validation tiles, of other patients.
        val_episodes: fixed episodes over `val`.
        augmentation: of the tiles.
        batch_size: tiles a step.
        cutmix: chance of a batch whose tiles each hold a patch of another; it is classified by
            both labels, by area, and not contrasted by class.
        supcon_weight: of the supervised contrastive loss.
        view_weight: of the contrast of two views; it doubles the work of a step.
        seed: of every random number.
        device: where the model lives.

    Source: Khosla et al. 2020 for the contrast of classes, Chen et al. 2020 for that of views, Yun
    et al. 2019 for CutMix.
    """

    name = "phase 2 (tiles)"

    def __init__(
        self,
        model: TransferModel,
        train: TileArrays,
        val: TileArrays,
        val_episodes: list[Episode],
        *,
        augmentation: TileAugmentation,
        batch_size: int,
        cutmix: float,
        supcon_weight: float,
        view_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        width = model.classifier.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._by_class, self._by_view = _projector(width), view_projector(width)
        parts = {
            "path_encoder": model.path_encoder,
            "classifier": model.classifier,
            "by_class": self._by_class,
            "by_view": self._by_view,
        }
        self.model: nn.Module = nn.ModuleDict(parts).to(device)
        self._model, self._val, self._val_episodes = model.to(device), val, val_episodes
        self._tiles, self._labels = augmentation.shrink(train.tiles), train.labels
        self._groups = _tiles_of_groups(train)
        self._augmentation, self._batch_size = augmentation, batch_size
        self._cutmix = cutmix
        self._supcon_weight, self._view_weight = supcon_weight, view_weight
        self._seed, self._device = seed, device

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Classify and contrast one batch; `progress` is not used."""
        rng = np.random.default_rng([self._seed, index])
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        views = 2 if self._view_weight > 0 else 1
        chosen = np.tile(self._draw(rng), views)
        drawn = self._tiles[torch.from_numpy(chosen)].to(self._device)
        tiles = self._augmentation(drawn, generator)
        labels = torch.from_numpy(self._labels[chosen]).to(self._device)
        mixed = rng.random() < self._cutmix
        partners, kept = torch.arange(len(tiles)), 1.0
        if mixed:
            tiles, partners, kept = cut_and_mix(tiles, rng)
        pooled = self._pooled(tiles)
        scores = self._model.classifier(pooled)
        plain = kept * _classified(scores, labels) + (1 - kept) * _classified(
            scores, labels[partners.to(self._device)]
        )
        terms = {"classifier_loss": plain}
        loss = plain
        if not mixed:
            terms["accuracy"] = (scores.argmax(dim=1) == labels).float().mean()
        if self._supcon_weight > 0 and not mixed:
            projected = self._by_class(pooled)
            terms["class_contrast"] = supervised_contrast(projected, labels, SUPCON_TEMPERATURE)
            loss = loss + self._supcon_weight * terms["class_contrast"]
        if views == 2 and not mixed:
            terms["view_contrast"], _ = contrast(self._by_view(pooled), VIEW_TEMPERATURE)
            loss = loss + self._view_weight * terms["view_contrast"]
        return {"loss": loss, **terms}

    def validate(self) -> dict[str, float]:
        """Measure accuracy and loss on the validation episodes, by nearest prototype."""
        embeddings = embed_tiles(self._model, self._val.tiles, None, self._device)
        embeddings = _unit(embeddings - embeddings.mean(axis=0))  # the running centre is phase 3's
        scores = score_episodes(embeddings, self._val_episodes, 10.0)
        return {"score": scores.accuracy, "val_accuracy": scores.accuracy, "val_loss": scores.nll}

    def _pooled(self, tiles: Tensor) -> Tensor:
        tokens: Tensor = self._model.path_encoder(tiles.to(memory_format=torch.channels_last))
        return tokens.mean(dim=1)

    def _draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw as many tiles of each class, of different groups while there are enough."""
        each = max(2, self._batch_size // len(self._groups))
        chosen = []
        for groups in self._groups:
            rounds = math.ceil(each / len(groups))
            order = np.concatenate([rng.permutation(len(groups)) for _ in range(rounds)])[:each]
            chosen += [int(rng.choice(groups[index])) for index in order]
        return np.array(chosen, dtype=np.int64)


def cut_and_mix(tiles: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Put into each tile a square patch of another, all in the same place.

    Args:
        tiles: `(B, M, S, S)`.
        rng: draws partners, size and place.

    Returns:
        The mixed tiles, each one's partner `(B,)`, and the share of the area that is its own.

    Source: Yun et al. 2019, eq. 1 and 2.
    """
    size = tiles.shape[-1]
    partners = torch.from_numpy(rng.permutation(len(tiles)))
    side = int(size * math.sqrt(1 - rng.random()))
    top, left = (int(start) for start in rng.integers(0, size - side + 1, 2))
    patch = (..., slice(top, top + side), slice(left, left + side))
    mixed = tiles.clone()
    mixed[patch] = tiles[partners][patch]
    return mixed, partners, 1 - (side / size) ** 2


def supervised_contrast(projected: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Draw tiles of one class together, away from the rest.

    Args:
        projected: `(B, P)`.
        labels: `(B,)`; a class with a single tile adds nothing.
        temperature: divides the cosines.

    Source: Khosla et al. 2020, eq. 2.
    """
    unit = functional.normalize(projected.float(), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosines = (unit @ unit.T / temperature).masked_fill(itself, -1e9)
    shares = cosines - cosines.logsumexp(dim=1, keepdim=True)
    alike = (labels[:, None] == labels[None]) & ~itself
    return -((shares * alike).sum(dim=1) / alike.sum(dim=1).clamp_min(1)).mean()


def _classified(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels, label_smoothing=LABEL_SMOOTHING)


def _tiles_of_groups(tiles: TileArrays) -> list[list[NDArray[np.int64]]]:
    """Indices of the tiles of each group, for each class that occurs."""
    return [
        [
            np.flatnonzero((tiles.labels == label) & (tiles.groups == group))
            for group in np.unique(tiles.groups[tiles.labels == label])
        ]
        for label in np.unique(tiles.labels)
    ]


def _projector(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, PROJECTION))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = vectors / np.maximum(
        np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6
    )
    return result
