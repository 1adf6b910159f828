"""A compact CT encoder that trains from nothing on a small machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.models.layers import GroupNorm


class CtEncoder(nn.Module):
    """Four strided stages of plain residual 3D convolutions, then tokens of the last two.

    Plain rather than depthwise convolutions: inference engines are slow at depthwise 3D ones.

    Args:
        windows: W, channels of the CT input.
        widths: channels of the four stages, each a multiple of 8.
        feature_dim: C, width of a token.
    """

    scales = 2

    def __init__(self, windows: int, widths: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.stem = nn.Conv3d(windows, widths[0], 3, (1, 2, 2), 1)
        self.stages = nn.ModuleList(
            # No normalisation on the main path: it would take away how dense tissue is.
            nn.Sequential(nn.Conv3d(before, after, 3, 2, 1), _Residual(after))
            for before, after in itertools.pairwise(widths)
        )
        self.project = nn.ModuleList(
            nn.Linear(width, feature_dim) for width in widths[-self.scales :]
        )

    def forward(self, ct: Tensor) -> Tensor:
        """Encode volumes.

        Args:
            ct: `(B, W, D, S, S)`, -1 to 1; D a multiple of 8, S of 32.

        Returns:
            `(B, T, C)` tokens: D / 8 times (S / 32) squared of the last stage but one, then as many
            of the last, each ordered z, y, x.
        """
        features = self.stem(ct)
        tokens = []
        for position, stage in enumerate(self.stages):
            features = stage(features)
            scale = position - len(self.stages) + self.scales
            if scale >= 0:
                depth, side = 2 ** (self.scales - 1 - scale), 2 ** (self.scales - scale)
                pooled = functional.avg_pool3d(features, (depth, side, side))
                tokens.append(self.project[scale](pooled.flatten(2).transpose(1, 2)))
        return torch.cat(tokens, dim=1)


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
