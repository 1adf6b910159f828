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

    Its last layer starts at zero: it begins undecided, at an accuracy of one half.

    Args:
        feature_dim: C.
        hidden: width of the hidden layer.
    """

    def __init__(self, feature_dim: int, hidden: int = 128) -> None:
        super().__init__()
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            # Of bounded size, or the two sides could win by growing without end.
            nn.LayerNorm(feature_dim, elementwise_affine=False),
            nn.Linear(feature_dim, hidden),
            nn.ReLU(),
            last,
        )

    def forward(self, tiles: Tensor, ct: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Score both domains behind the gradient reversal.

        Both count alike, however many tiles stand against one CT.

        Args:
            tiles: `(B, N, C)`, pooled over N.
            ct: `(A, T, C)`, pooled over T.
            strength: of the reversal.

        Returns:
            The loss, and the balanced accuracy of the discriminator (undecided counts half).
        """
        tile_score = self.layers(reverse_gradient(tiles.mean(dim=1), strength))
        ct_score = self.layers(reverse_gradient(ct.mean(dim=1), strength))
        loss = 0.5 * (
            functional.binary_cross_entropy_with_logits(tile_score, torch.zeros_like(tile_score))
            + functional.binary_cross_entropy_with_logits(ct_score, torch.ones_like(ct_score))
        )
        right = torch.sign(ct_score).mean() - torch.sign(tile_score).mean()
        return loss, 0.5 + 0.25 * right.detach()


def coral(tiles: Tensor, ct: Tensor) -> Tensor:
    """Distance between the covariances of tile tokens `(B, N, C)` and CT tokens `(A, T, C)`.

    Source: Sun and Saenko 2016 (Deep CORAL), eq. 1.
    """
    first, second = (_covariance(side.flatten(0, 1).float()) for side in (tiles, ct))
    return (first - second).square().sum() / (4 * first.shape[0] ** 2)


def mmd(tiles: Tensor, ct: Tensor, most: int = 256) -> Tensor:
    """Squared maximum mean discrepancy of tile tokens `(B, N, C)` and CT tokens `(A, T, C)`.

    Five Gaussian kernels around the mean squared distance, on at most `most` evenly spaced tokens
    of each side.

    Source: Gretton et al. 2012, eq. 5; the kernels as in Long et al. 2015.
    """
    sides = [_evenly(side.flatten(0, 1).float(), most) for side in (tiles, ct)]
    tokens = torch.cat(sides)
    squared = (tokens[:, None] - tokens[None]).square().sum(dim=-1)
    width = squared.detach().mean().clamp_min(1e-6)
    kernel = sum(torch.exp(-squared / (width * 2.0**power)) for power in range(-2, 3))
    assert isinstance(kernel, Tensor)
    count = len(sides[0])
    within = kernel[:count, :count].mean() + kernel[count:, count:].mean()
    return within - 2 * kernel[:count, count:].mean()


def _covariance(tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(dim=0)
    return centred.T @ centred / max(1, len(tokens) - 1)


def _evenly(tokens: Tensor, most: int) -> Tensor:
    return tokens[:: -(-len(tokens) // most)]
