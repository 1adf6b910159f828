"""Layers that keep float32 where half precision would lose decisions.

In a model cast to half precision they compute in float32 and return the dtype they were given. In a
float32 model the casts vanish.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Offset(nn.Module):
    """Subtract the mean: of the batch in training, the running one at inference.

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


class Centre(Offset):
    """Subtract the mean embedding and, at inference, favour what tells the training classes apart.

    Centred, unit vectors spread over the whole sphere; uncentred, the part that all tiles share
    would crowd them into one corner of it. Directions in which training classes do not differ hold
    mostly what differs between tiles of one class, which misleads a prototype of few tiles; they
    are shrunk, not dropped, because classes to come may differ in them.

    Args:
        width: E.
        axes: number of directions in which classes differ: one less than there are classes.
        momentum: weight of a new batch in the running mean.
    """

    axes: Tensor
    rest: Tensor

    def __init__(self, width: int, axes: int, momentum: float = 0.05) -> None:
        super().__init__(width, momentum)
        self.register_buffer("axes", torch.zeros(width, axes))
        self.register_buffer("rest", torch.ones(1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Centre `(B, E)`, in float32."""
        centred: Tensor = super().forward(vectors)
        if self.training:
            return centred
        axes, rest = self.axes.float(), self.rest.float()
        return rest * centred + (1 - rest) * torch.matmul(torch.matmul(centred, axes), axes.T)

    @torch.no_grad()
    def settle(self, vectors: Tensor, labels: Tensor, rest: float) -> None:
        """Take mean and axes from training tiles, as they are at inference.

        Args:
            vectors: `(n, E)`, not centred.
            labels: `(n,)` int64.
            rest: what the other directions are multiplied by; 1 leaves all alike.
        """
        means = torch.stack([vectors[labels == c].mean(dim=0) for c in torch.unique(labels)])
        self.mean.copy_(means.mean(dim=0))
        _, _, directions = torch.linalg.svd((means - self.mean).double(), full_matrices=False)
        self.axes.copy_(directions[: self.axes.shape[1]].T)
        self.rest.fill_(rest)


def unit_length(vectors: Tensor) -> Tensor:
    """Bring vectors `(..., E)` to unit length, in float32."""
    return functional.normalize(vectors.float(), dim=-1)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis with float32 sums."""
    return scores.float().softmax(dim=-1).to(scores.dtype)
