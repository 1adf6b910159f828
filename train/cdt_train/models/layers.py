"""Layers that keep float32 where half precision would lose decisions.

In a model cast to half precision they compute in float32 and return the dtype they were given. In a
float32 model the casts vanish.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GroupNorm(nn.GroupNorm):
    """Group normalisation with float32 statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, C, ...)`."""
        weight, bias = self.weight.float(), self.bias.float()
        result = functional.group_norm(input.float(), self.num_groups, weight, bias, self.eps)
        return result.to(input.dtype)


class Centre(nn.Module):
    """Subtract the mean embedding: of the batch in training, of training at inference.

    Centred, unit vectors spread over the whole sphere; uncentred, the part that all tiles share
    would crowd them into one corner of it. Unlike a full standardisation it does not blow up
    directions that hold nothing but noise.

    Args:
        width: E.
        momentum: weight of a new batch in the running mean.
    """

    mean: Tensor

    def __init__(self, width: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Centre `(B, E)`, in float32."""
        vectors = vectors.float()
        if not self.training:
            return vectors - self.mean.float()
        mean = vectors.mean(dim=0)
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
        return vectors - mean


def unit_length(vectors: Tensor) -> Tensor:
    """Bring vectors `(..., E)` to unit length, in float32."""
    return functional.normalize(vectors.float(), dim=-1)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis with float32 sums."""
    return scores.float().softmax(dim=-1).to(scores.dtype)
