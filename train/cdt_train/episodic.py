"""Phase 3: episodic training of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.augment import TileAugmentation
from cdt_train.contexts import Contexts
from cdt_train.data.arrays import TileArrays
from cdt_train.embed import embed_tokens, tile_tokens
from cdt_train.episodes import Episode, EpisodeSampler
from cdt_train.models.domain import coral, mmd, ramp
from cdt_train.models.prototypical import class_means
from cdt_train.models.transfer_model import TransferModel
from cdt_train.scores import score_episodes
from cdt_train.seeding import step_seed

Mode = Literal["ct", "bank", "none"]


@dataclass(frozen=True)
class EpisodeRecipe:
    """What an episode's loss is made of.

    Attributes:
        ct_share: share of the episodes in the context of a CT.
        bank_share: share in the context of the learnt bank; the rest have none.
        proxy_weight: of a plain classification of all tiles by class proxies, which learns from
            every tile where an episode learns from its queries alone.
        agreement_weight: of the divergence between the answers with a CT and without, where CT and
            tiles are of different patients: such a CT must not change an answer.
        domain_method: how the two sides are drawn together in the bridge.
        domain_weight: of it; for `adversarial` the top of the gradient-reversal ramp.
        silence: share of the episodes in which a foundation encoder says nothing, each by itself;
            1 for training without them.
    """

    ct_share: float = 0.5
    bank_share: float = 0.25
    proxy_weight: float = 0.5
    agreement_weight: float = 0.1
    domain_method: Literal["adversarial", "coral", "mmd", "none"] = "adversarial"
    domain_weight: float = 0.3
    silence: float = 0.25


class EpisodicPhase:
    """Each step is one few-shot task drawn from the training patients.

    Where CT and tiles are of the same patients, each tile sees its own patient's CT. Otherwise one
    CT is shared by all classes of an episode, so that it can't give the label away.

    Args:
        model: trained in place.
        train: training tiles.
        val: validation tiles, of other patients.
        contexts: CT that training may see.
        sampler: draws training episodes from `train`.
        val_episodes: fixed episodes over `val`.
        augmentation: of the tiles.
        recipe: of the loss.
        seed: of every random number.
        device: where the model lives.
        name: shown to the user.
        val_contexts: the CT of validation patients, where they have one: the best epoch is then
            the one that answers best with it.
    """

    def __init__(
        self,
        model: TransferModel,
        train: TileArrays,
        val: TileArrays,
        contexts: Contexts,
        sampler: EpisodeSampler,
        val_episodes: list[Episode],
        *,
        augmentation: TileAugmentation,
        recipe: EpisodeRecipe,
        seed: int,
        device: torch.device,
        name: str = "phase 3 (episodes)",
        val_contexts: Contexts | None = None,
    ) -> None:
        self.name = name
        self.model: nn.Module = model.to(device)
        self._model, self._train, self._val = model, train, val
        self._contexts, self._sampler, self._val_episodes = contexts, sampler, val_episodes
        self._tiles = augmentation.shrink(train.tiles)
        self._augmentation, self._recipe = augmentation, recipe
        self._seed, self._device, self._val_contexts = seed, device, val_contexts

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Compute the losses of one episode."""
        rng = np.random.default_rng([self._seed, index])
        episode = self._sampler.sample(rng)
        chosen = np.concatenate([episode.support, episode.query])
        mode = self._draw_mode(rng)
        ct_tokens, present = self._context(mode, chosen, rng)
        tokens = self._tokens(chosen, index, self._heard(rng))
        embedded = self._model.bridge(tokens, ct_tokens, present)
        logits, few_shot, accuracy = self._few_shot(embedded, episode)
        proxy = self._by_proxies(embedded, chosen)
        loss = few_shot + self._recipe.proxy_weight * proxy
        terms = {"episode_loss": few_shot, "proxy_loss": proxy, "accuracy": accuracy}
        if mode != "none" and not self._contexts.paired:
            apart = self._divergence(tokens, logits, episode)
            terms["agreement_loss"] = apart
            loss = loss + self._recipe.agreement_weight * apart
        if mode == "ct" and self._recipe.domain_method != "none":
            aligned = self._alignment(tokens, ct_tokens, progress)
            loss = loss + aligned["domain_loss"]
            terms |= aligned
        return {"loss": loss, **terms}

    def validate(self) -> dict[str, float]:
        """Measure accuracy and loss on the validation episodes."""
        said = {} if self._recipe.silence == 1 else self._val.features
        tokens = tile_tokens(self._model, self._val.tiles, self._device, said)
        own = self._val_contexts
        context = own.of_tiles(self._val.groups) if own else self._model.context(None)
        embeddings = embed_tokens(self._model, tokens, context)
        scale = float(self._model.head.scale.item())
        scores = score_episodes(embeddings, self._val_episodes, scale)
        gate = float(torch.tanh(self._model.bridge.gate).item())
        return {
            "score": scores.accuracy,
            "val_accuracy": scores.accuracy,
            "val_loss": scores.nll,
            "gate": gate,
        }

    def _heard(self, rng: np.random.Generator) -> list[str]:
        """Draw which foundation encoders are heard."""
        return [key for key in self._train.features if rng.random() >= self._recipe.silence]

    def _tokens(self, chosen: NDArray[np.int64], index: int, heard: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        places = torch.from_numpy(chosen)
        drawn = self._tiles[places].to(self._device)
        tiles = self._augmentation(drawn, generator).to(memory_format=torch.channels_last)
        said = {key: self._train.features[key][places] for key in heard}
        return self._model.tile_tokens(tiles, said)

    def _draw_mode(self, rng: np.random.Generator) -> Mode:
        drawn = rng.random()
        if drawn < self._recipe.ct_share:
            return "ct" if len(self._contexts) else "none"
        return "bank" if drawn < self._recipe.ct_share + self._recipe.bank_share else "none"

    def _context(
        self, mode: Mode, chosen: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return context tokens `(1 | B, T, C)` and their presence `(1 | B,)`."""
        if mode == "bank":
            bank = self._model.bridge.bank_context()
            return bank, bank.new_ones(1)
        if mode == "none":
            return self._model.context(None)
        if self._contexts.paired:
            return self._contexts.of_tiles(self._train.groups[chosen])
        return self._contexts.one(int(rng.integers(len(self._contexts))))

    def _few_shot(self, embedded: Tensor, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        truth = torch.from_numpy(episode.query_labels).to(self._device)
        logits = self._episode_logits(embedded, episode)
        accuracy = (logits.argmax(dim=1) == truth).float().mean()
        return logits, functional.cross_entropy(logits, truth), accuracy

    def _episode_logits(self, embedded: Tensor, episode: Episode) -> Tensor:
        count = len(episode.support)
        labels = torch.from_numpy(episode.support_labels).to(self._device)
        prototypes = class_means(embedded[:count], labels, len(episode.classes))
        logits: Tensor = self._model.head(embedded[count:], prototypes, self._model.head.scale)[0]
        return logits

    def _by_proxies(self, embedded: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        proxies = functional.normalize(self._model.classifier.weight, dim=1)
        truth = torch.from_numpy(self._train.labels[chosen]).to(self._device)
        logits, _ = self._model.head(embedded, proxies, self._model.head.scale)
        return functional.cross_entropy(logits, truth)

    def _divergence(self, tokens: Tensor, logits: Tensor, episode: Episode) -> Tensor:
        """Kullback-Leibler divergence of the answers in context from those of the tile alone."""
        alone = self._model.bridge(tokens, *self._model.context(None))
        plain = self._episode_logits(alone, episode)
        return functional.kl_div(
            functional.log_softmax(logits, dim=1),
            functional.log_softmax(plain.detach(), dim=1),
            log_target=True,
            reduction="batchmean",
        )

    def _alignment(self, tokens: Tensor, ct: Tensor, progress: float) -> dict[str, Tensor]:
        tiles, volumes = self._model.bridge.projected(tokens, ct)
        method, weight = self._recipe.domain_method, self._recipe.domain_weight
        strength = ramp(progress, weight) if method == "adversarial" else 0.0
        loss, accuracy = self._model.discriminator(tiles, volumes, strength)
        if method == "coral":
            loss = loss + weight * coral(tiles, volumes)
        elif method == "mmd":
            loss = loss + weight * mmd(tiles, volumes)
        return {"domain_loss": loss, "domain_accuracy": accuracy}
