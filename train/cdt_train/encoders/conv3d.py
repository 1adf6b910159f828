"""A compact CT encoder that trains from nothing on a small machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from cdt_train.models.layers import GroupNorm


class CtEncoder(nn.Module):
    """Four strided stages of plain residual 3D convolutions, then a grid of tokens.

    Plain rather than depthwise convolutions: inference engines are slow at depthwise 3D ones.

    Args:
        windows: W, channels of the CT input.
        widths: channels of the four stages, each a multiple of 8.
        feature_dim: C, width of a token.
    """

    def __init__(self, windows: int, widths: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(windows, widths[0], 3, (1, 2, 2), 1)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv3d(before, after, 3, 2, 1), GroupNorm(8, after), _Residual(after)
                )
                for before, after in itertools.pairwise(widths)
            )
        )
        self.pool = nn.AvgPool3d((1, 2, 2))
        self.project = nn.Linear(widths[-1], feature_dim)

    def forward(self, ct: Tensor) -> Tensor:
        """Encode volumes.

        Args:
            ct: `(B, W, D, S, S)`, -1 to 1.

        Returns:
            `(B, T, C)` tokens, T = D / 8 times (S / 32) squared, ordered z, y, x.
        """
        features = self.pool(self.stages(self.stem(ct)))
        tokens: Tensor = self.project(features.flatten(2).transpose(1, 2))
        return tokens


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv3d(width, width, 3, padding=1), GroupNorm(8, width)
        )
        self.last = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.last(features + self.body(features))
        return result
