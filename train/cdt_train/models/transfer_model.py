"""The whole model, put together from its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdt_train.encoders.conv2d import PathEncoder
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.models.bridge import Bridge
from cdt_train.models.domain import DomainDiscriminator
from cdt_train.models.prototypical import PrototypicalHead


class TransferModel(nn.Module):
    """The parts that are exported, and two that serve training alone.

    Args:
        ct_encoder: CT to tokens.
        path_encoder: tile to tokens.
        bridge: both to an embedding.
        head: embedding and prototypes to logits.
        discriminator: for domain alignment.
        classifier: a linear layer over the training classes; its loss teaches the tile encoder
            much faster than episodes alone.
    """

    def __init__(
        self,
        ct_encoder: CtEncoder,
        path_encoder: PathEncoder,
        bridge: Bridge,
        head: PrototypicalHead,
        discriminator: DomainDiscriminator,
        classifier: nn.Linear,
    ) -> None:
        super().__init__()
        self.ct_encoder = ct_encoder
        self.path_encoder = path_encoder
        self.bridge = bridge
        self.head = head
        self.discriminator = discriminator
        self.classifier = classifier

    def context(self, ct: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode a CT, or stand in for none.

        Args:
            ct: `(A, W, D, S, S)` or None.

        Returns:
            CT tokens `(A, T, C)` and presence `(A,)`; for None one stand-in that is not present.
        """
        like = self.head.log_scale
        if ct is None:
            return torch.zeros_like(self.bridge.bank), like.new_zeros(1)
        return self.ct_encoder(ct), like.new_ones(len(ct))


def build_model(
    *,
    channels: int,
    n_classes: int,
    windows: int,
    feature_dim: int,
    num_heads: int,
    path_widths: Sequence[int],
    ct_widths: Sequence[int],
    bank_size: int,
    seed: int,
) -> TransferModel:
    """Build the model with seeded weights; `ModelRecipe` and `DataRecipe` describe the numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransferModel(
            CtEncoder(windows, ct_widths, feature_dim),
            PathEncoder(channels, path_widths, feature_dim),
            Bridge(feature_dim, num_heads, n_classes, bank_size),
            PrototypicalHead(),
            DomainDiscriminator(feature_dim),
            nn.Linear(feature_dim, n_classes),
        )
