"""A compact CT encoder that trains from nothing on a small machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class CtEncoder(nn.Module):
    """Four strided stages of plain residual 3D convolutions, then tokens of the last two.

    Plain rather than depthwise convolutions: inference engines are slow at depthwise 3D ones. With
    batch statistics what phase 1 learns of one patient holds for another; without any
    normalisation, or with that of each volume, it did not.

    Args:
        windows: W, channels of the CT input.
        widths: channels of the four stages, each a multiple of 8.
        feature_dim: C, width of a token.
    """

    scales = 2

    def __init__(self, windows: int, widths: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.stem = _convolution(windows, widths[0], (1, 2, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(_convolution(before, after, (2, 2, 2)), _Residual(after))
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
        self.body = _convolution(width, width, (1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + self.body(features)
        return result


def _convolution(before: int, after: int, stride: tuple[int, int, int]) -> nn.Sequential:
    # Batch statistics, not a volume's own: those would take away how dense its tissue is.
    return nn.Sequential(
        nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU()
    )
