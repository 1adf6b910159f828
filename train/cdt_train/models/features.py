"""Features of foundation encoders, brought to the width that the bridge works in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, int]]
"""By encoder, the number of its tokens and their width `(X, W)`."""


class FeatureTokens(nn.Module):
    """A projection of its own for each encoder; features of zeros give tokens of zeros.

    Zeros are how an encoder that said nothing is written, here as in the bridge, which masks them:
    what is missing is neither guessed nor taken for something.

    Args:
        shapes: of the encoders' features, in the order of the tokens.
        width: C, of the tokens.
    """

    def __init__(self, shapes: Shapes, width: int) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width)) for _, wide in shapes.values()
        )

    @property
    def count(self) -> int:
        """Tokens of all encoders together."""
        return sum(count for count, _ in self.shapes.values())

    @property
    def size(self) -> int:
        """F, figures of all encoders together."""
        return sum(count * wide for count, wide in self.shapes.values())

    def forward(self, features: Tensor) -> Tensor:
        """Project the features of all encoders, `(B, F)` as `flat` gives them, to `(B, X, C)`."""
        found, first = [], 0
        for (count, wide), project in zip(self.shapes.values(), self.project, strict=True):
            part = features[:, first : first + count * wide].reshape(-1, count, wide)
            there = (part.abs().amax(dim=(1, 2), keepdim=True) > 0).to(part.dtype)
            found.append(project(part) * there)
            first += count * wide
        return torch.cat(found, dim=1)

    def flat(self, features: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Lay the features of all encoders side by side, zeros for one that is not there.

        Args:
            features: by encoder `(B, X, W)`.
            like: `(B, ...)`, whose batch and device they share.

        Returns:
            `(B, F)` float32.
        """
        parts = [
            features[key].to(like.device).flatten(1)
            if key in features
            else torch.zeros(len(like), count * wide, device=like.device)
            for key, (count, wide) in self.shapes.items()
        ]
        return torch.cat(parts, dim=1)
