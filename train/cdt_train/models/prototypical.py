"""The prototypical head: distance to class means on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdt_train.models.layers import unit_length


class PrototypicalHead(nn.Module):
    """Logits from squared distances to prototypes, with a learnt scale.

    Source: Snell et al. 2017; the scale as in Oreshkin et al. 2018.
    """

    def __init__(self, initial_scale: float = 5.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([initial_scale]).log())

    @property
    def scale(self) -> Tensor:
        """The learnt factor of the negative squared distance, `(1,)`."""
        return self.log_scale.exp()

    def forward(
        self, embedding: Tensor, prototypes: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compare embeddings with prototypes.

        Args:
            embedding: `(B, E)` unit vectors.
            prototypes: `(K, E)` unit vectors.
            scale: `(1,)`.

        Returns:
            logits `(B, K)` and Euclidean distances `(B, K)`.
        """
        squared = (2.0 - 2.0 * torch.matmul(embedding, prototypes.transpose(0, 1))).clamp_min(0.0)
        return -scale * squared, squared.sqrt()


def class_means(embeddings: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """Mean of each class's embeddings, brought back to unit length.

    Args:
        embeddings: `(S, E)` unit vectors.
        labels: `(S,)` int64, 0 to `n_way` - 1, each at least once.
        n_way: K.

    Returns:
        `(K, E)`.
    """
    one_hot = torch.nn.functional.one_hot(labels, n_way).to(embeddings.dtype)
    means = torch.matmul(one_hot.transpose(0, 1), embeddings) / one_hot.sum(dim=0)[:, None]
    return unit_length(means)
