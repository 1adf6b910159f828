"""Phase 2: episodic training of the whole model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.augment import augment_tiles
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.episodes import Episode, EpisodeSampler
from cdt_train.evaluate import score_episodes
from cdt_train.models.domain import ramp
from cdt_train.models.prototypical import class_means
from cdt_train.models.transfer_model import TransferModel
from cdt_train.seeding import step_seed

BATCH = 64
Floats = NDArray[np.float32]


class EpisodicPhase:
    """Each step is one few-shot task drawn from the training patients.

    One CT is shared by all classes of an episode, so that it can't give the label away; some
    episodes have none.

    Args:
        model: trained in place.
        train: training tiles.
        val: validation tiles, of other patients.
        ct: CT volumes that training may see.
        sampler: draws training episodes from `train`.
        val_episodes: fixed episodes over `val`.
        channel_dropout: see `augment_tiles`.
        ct_dropout: share of the episodes without CT.
        classifier_share: share of the steps that a linear classifier over the training classes
            leads; episodes alone teach a fresh encoder next to nothing.
        domain_weight: top of the gradient-reversal ramp.
        seed: of every random number.
        device: where the model lives.
    """

    name = "phase 2 (episodes)"

    def __init__(
        self,
        model: TransferModel,
        train: TileArrays,
        val: TileArrays,
        ct: CtArrays,
        sampler: EpisodeSampler,
        val_episodes: list[Episode],
        *,
        channel_dropout: float,
        ct_dropout: float,
        classifier_share: float,
        domain_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model: nn.Module = model.to(device)
        self._model, self._train, self._val, self._ct = model, train, val, ct
        self._sampler, self._val_episodes = sampler, val_episodes
        self._channel_dropout, self._ct_dropout = channel_dropout, ct_dropout
        self._classifier_share, self._domain_weight = classifier_share, domain_weight
        self._seed, self._device = seed, device
        self._generator = torch.Generator()
        self._rng = np.random.default_rng(seed)

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the losses of one episode."""
        self._generator.manual_seed(step_seed(self._seed, index))
        self._rng = np.random.default_rng([self._seed, index])
        episode = self._sampler.sample(self._rng)
        chosen = np.concatenate([episode.support, episode.query])
        tokens = self._model.path_encoder(self._augmented(chosen))
        ct = self._draw_ct()
        ct_tokens, present = self._model.context(ct)
        embedded = self._model.bridge(tokens, ct_tokens, present)
        few_shot, accuracy = self._few_shot_loss(embedded, episode)
        truth = torch.from_numpy(self._train.labels[chosen]).to(self._device)
        scores = self._model.classifier(tokens.mean(dim=1))
        plain = functional.cross_entropy(scores, truth, label_smoothing=0.1)
        blend = handover(progress, self._classifier_share)
        loss = blend * few_shot + (1 - blend) * plain
        terms = {"episode_loss": few_shot, "classifier_loss": plain, "accuracy": accuracy}
        if ct is not None and self._domain_weight > 0:
            strength = ramp(progress, self._domain_weight)
            sides = self._model.bridge.projected(tokens, ct_tokens)
            domain_loss, domain_accuracy = self._model.discriminator(*sides, strength)
            terms |= {"domain_loss": domain_loss, "domain_accuracy": domain_accuracy}
            loss = loss + domain_loss
        return {"loss": loss, **terms}

    def validate(self) -> dict[str, float]:
        """Measure accuracy and loss on the validation episodes, without CT."""
        embeddings = embed_tiles(self._model, self._val.tiles, None, self._device)
        scale = float(self._model.head.scale.item())
        scores = score_episodes(embeddings, self._val_episodes, scale)
        return {"score": scores.accuracy, "val_accuracy": scores.accuracy, "val_loss": scores.nll}

    def _augmented(self, chosen: NDArray[np.int64]) -> Tensor:
        tiles = self._train.tiles[torch.from_numpy(chosen)]
        changed = augment_tiles(tiles, self._channel_dropout, self._generator)
        return changed.to(self._device, memory_format=torch.channels_last)

    def _draw_ct(self) -> Tensor | None:
        if len(self._ct) == 0 or self._rng.random() < self._ct_dropout:
            return None
        index = int(self._rng.integers(len(self._ct)))
        return self._ct.volumes[index : index + 1].to(self._device)

    def _few_shot_loss(self, embedded: Tensor, episode: Episode) -> tuple[Tensor, Tensor]:
        count = len(episode.support)
        labels = torch.from_numpy(episode.support_labels).to(self._device)
        truth = torch.from_numpy(episode.query_labels).to(self._device)
        prototypes = class_means(embedded[:count], labels, len(episode.classes))
        logits, _ = self._model.head(embedded[count:], prototypes, self._model.head.scale)
        accuracy = (logits.argmax(dim=1) == truth).float().mean()
        return functional.cross_entropy(logits, truth), accuracy


def handover(progress: float, share: float, width: float = 0.1) -> float:
    """Weight of the episodes' loss: 0 before `share` of the steps, 1 after, a short ramp between.

    With a share of 0 it is 1 from the first step.
    """
    if share <= 0:
        return 1.0
    return min(1.0, max(0.0, (progress - share) / width + 0.5))


@torch.no_grad()
def embed_tiles(
    model: TransferModel, tiles: Tensor, ct: Tensor | None, device: torch.device
) -> Floats:
    """Embed many tiles in one CT context.

    Args:
        model: put into evaluation mode.
        tiles: `(n, M, S, S)`.
        ct: `(1, W, D, S, S)` or None.
        device: where the model lives.

    Returns:
        `(n, E)` float32 unit vectors.
    """
    model.eval()
    ct_tokens, present = model.context(None if ct is None else ct.to(device))
    parts = [
        model.bridge(
            model.path_encoder(batch.to(device, memory_format=torch.channels_last)),
            ct_tokens,
            present,
        )
        for batch in torch.split(tiles, BATCH)
    ]
    result: Floats = torch.cat(parts).cpu().numpy()
    return result
