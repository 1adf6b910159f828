"""Domain-adversarial alignment of tile and CT features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """Pass features on unchanged; multiply their gradient by minus `strength`.

    Source: Ganin and Lempitsky 2015, section 3.
    """
    result: Tensor = _Reverse.apply(features, strength)  # type: ignore[no-untyped-call]
    return result


def ramp(progress: float, top: float) -> float:
    """Strength of the reversal at a share of training: 0 at the start, near `top` at the end.

    Source: Ganin and Lempitsky 2015, section 4.
    """
    return top * (2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0)


class DomainDiscriminator(nn.Module):
    """Tells pooled CT features from pooled tile features.

    Args:
        feature_dim: C.
        hidden: width of the hidden layer.
    """

    def __init__(self, feature_dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            # Of bounded size, or the two sides could win by growing without end.
            nn.LayerNorm(feature_dim, elementwise_affine=False),
            nn.Linear(feature_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, tiles: Tensor, ct: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Score both domains behind the gradient reversal.

        Both count alike, however many tiles stand against one CT.

        Args:
            tiles: `(B, C)`.
            ct: `(1, C)`.
            strength: of the reversal.

        Returns:
            The loss, and the balanced accuracy of the discriminator.
        """
        tile_score = self.layers(reverse_gradient(tiles, strength))
        ct_score = self.layers(reverse_gradient(ct, strength))
        loss = 0.5 * (
            functional.binary_cross_entropy_with_logits(tile_score, torch.zeros_like(tile_score))
            + functional.binary_cross_entropy_with_logits(ct_score, torch.ones_like(ct_score))
        )
        accuracy = 0.5 * ((tile_score < 0).float().mean() + (ct_score > 0).float().mean())
        return loss, accuracy
