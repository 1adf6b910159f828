"""Foundation encoders behind one face: prepared images in, an embedding and perhaps tokens out.

An encoder is a module and its card. The module takes what `cdt_runtime.encoder_input` makes by the
card, and gives `(embedding,)` or `(embedding, tokens)`: tensors alone, so that it can be exported
as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdt_runtime.encoder_card import EncoderCard
from cdt_train.encoders.entry import Entry, random_card

BATCH = 8


class Encoded(NamedTuple):
    """What an encoder says of images.

    Attributes:
        embedding: `(B, D)` float32.
        tokens: `(B, N, Dt)` float32, or None where it gives none.
    """

    embedding: Tensor
    tokens: Tensor | None


@dataclass(frozen=True, eq=False)
class FoundationEncoder:
    """A loaded encoder.

    Attributes:
        card: with `origin` and `weights_sha256` filled in.
        module: in evaluation mode, its weights frozen.
    """

    card: EncoderCard
    module: nn.Module

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """Encode prepared images, a few at a time.

        Args:
            images: `(B, ...)` float32, each as `encoder_input` makes it.
        """
        own = next(self.module.parameters(), None)
        device = torch.device("cpu") if own is None else own.device
        parts = [self.module(batch.to(device)) for batch in torch.split(images, BATCH)]
        embedding = torch.cat([part[0].float().cpu() for part in parts])
        if self.card.token_dim is None:
            return Encoded(embedding, None)
        return Encoded(embedding, torch.cat([part[1].float().cpu() for part in parts]))


def made_random(entry: Entry, *, tiny: bool, seed: int) -> FoundationEncoder:
    """Make an encoder with random weights, marked as such; it knows nothing."""
    card = random_card(entry, tiny=tiny, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = entry.random(card)
    return FoundationEncoder(card, frozen(module))


def frozen(module: nn.Module) -> nn.Module:
    """Put a module into evaluation mode, its weights not to be trained."""
    return module.eval().requires_grad_(False)
