"""Layers that keep float32 where half precision would lose decisions.

In a model cast to half precision they compute in float32 and return the dtype they were given. In a
float32 model the casts vanish.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class GroupNorm(nn.GroupNorm):
    """Group normalisation with float32 statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, C, ...)`."""
        weight, bias = self.weight.float(), self.bias.float()
        result = functional.group_norm(input.float(), self.num_groups, weight, bias, self.eps)
        return result.to(input.dtype)


def unit_length(vectors: Tensor) -> Tensor:
    """Bring vectors `(..., E)` to unit length, in float32."""
    return functional.normalize(vectors.float(), dim=-1)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis with float32 sums."""
    return scores.float().softmax(dim=-1).to(scores.dtype)
