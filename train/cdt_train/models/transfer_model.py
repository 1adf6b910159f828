"""The whole model, put together from its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cdt_train.encoders.conv2d import PathEncoder
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.encoders.foundation_path import FoundationPath
from cdt_train.models.bridge import Bridge
from cdt_train.models.domain import DomainDiscriminator
from cdt_train.models.features import FeatureTokens, Shapes
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
        tile_features: brings what foundation encoders say of a tile to tokens; of none by default.
        ct_features: the same of a CT.
    """

    def __init__(
        self,
        ct_encoder: CtEncoder,
        path_encoder: PathEncoder | FoundationPath,
        bridge: Bridge,
        head: PrototypicalHead,
        discriminator: DomainDiscriminator,
        classifier: nn.Linear,
        tile_features: FeatureTokens | None = None,
        ct_features: FeatureTokens | None = None,
    ) -> None:
        super().__init__()
        self.ct_encoder = ct_encoder
        self.path_encoder = path_encoder
        self.bridge = bridge
        self.head = head
        self.discriminator = discriminator
        self.classifier = classifier
        self.tile_features = tile_features or FeatureTokens({}, 0)
        self.ct_features = ct_features or FeatureTokens({}, 0)

    def tile_tokens(self, tiles: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Encode tiles.

        Args:
            tiles: `(B, M, S, S)`.
            features: by foundation encoder `(B, X, W)`; one that is missing counts as silent.

        Returns:
            `(B, N, C)`, then the tokens of foundation encoders.
        """
        return _joined(self.path_encoder(tiles), self.tile_features, features)

    def context(
        self, ct: Tensor | None, features: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode a CT, or stand in for none.

        Args:
            ct: `(A, W, D, S, S)` or None.
            features: by foundation encoder `(A, X, W)`.

        Returns:
            CT tokens `(A, T, C)`, then those of foundation encoders, and presence `(A,)`; for None
            one stand-in that is not present.
        """
        like = self.head.log_scale
        if ct is None:
            return torch.zeros_like(self.bridge.bank_context()), like.new_zeros(1)
        return self.ct_tokens(ct, features or {}), like.new_ones(len(ct))

    def ct_tokens(self, ct: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Encode volumes `(A, W, D, S, S)`, and behind them their features, as `context`."""
        return _joined(self.ct_encoder(ct), self.ct_features, features)


def _joined(tokens: Tensor, project: FeatureTokens, features: Mapping[str, Tensor]) -> Tensor:
    if not project.count:
        return tokens
    extra = project(project.flat(features, tokens))
    return torch.cat([tokens, extra.to(tokens.dtype)], dim=1)


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
    tile_features: Shapes | None = None,
    ct_features: Shapes | None = None,
    path_encoder: PathEncoder | FoundationPath | None = None,
) -> TransferModel:
    """Build the model with seeded weights; `ModelRecipe` and `DataRecipe` describe the numbers.

    A `path_encoder` that is given takes the place of the house's own.
    """
    of_tile, of_ct = tile_features or {}, ct_features or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransferModel(
            CtEncoder(windows, ct_widths, feature_dim),
            path_encoder or PathEncoder(channels, path_widths, feature_dim),
            Bridge(
                feature_dim,
                num_heads,
                n_classes,
                bank_size,
                tile_scales=PathEncoder.scales if path_encoder is None else path_encoder.scales,
                tile_extras=sum(count for count, _ in of_tile.values()),
                ct_extras=sum(count for count, _ in of_ct.values()),
            ),
            PrototypicalHead(),
            DomainDiscriminator(feature_dim),
            nn.Linear(feature_dim, n_classes),
            FeatureTokens(of_tile, feature_dim),
            FeatureTokens(of_ct, feature_dim),
        )
