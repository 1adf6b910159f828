"""A compact residual encoder of isotropic volumes, such as segmented shapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

BLURS = 4
"""Box means of growing reach, beside the volume itself: thickness at a glance."""

LEAST = 1e-4
"""Weight of a place where nothing is, so that an empty volume has tokens too."""


class ShapeEncoder(nn.Module):
    """Box means, a strided stem, then strided stages with one residual block each.

    Unlike the CT encoder it treats the three axes alike, and normalises by batch: the size of a
    shape must survive, which normalising each volume by itself would take away. Where something is
    counts more than where nothing is: tokens are weighted by the volume's mean at their place, so
    that their plain mean is one over the shape.

    Args:
        channels: of a volume.
        widths: channels of the stem and of the stages.
        feature_dim: C, width of a token.
    """

    def __init__(self, channels: int, widths: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.stem = _convolved(channels * (1 + BLURS), widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(_convolved(before, after, stride=2), _Residual(after))
            for before, after in itertools.pairwise(widths)
        )
        self.project = nn.Linear(widths[-2] + widths[-1], feature_dim)

    def forward(self, volume: Tensor) -> Tensor:
        """Encode volumes.

        Args:
            volume: `(B, W, D, H, W)` float, 0 to 1.

        Returns:
            `(B, N, C)` tokens, ordered z, y, x.
        """
        # Channels last: convolutions of few channels run twice as fast on a CPU.
        levels = torch.cat(_box_means(volume), dim=1)
        features = self.stem(levels.contiguous(memory_format=torch.channels_last_3d))
        before = features
        for stage in self.stages:
            before, features = features, stage(features)
        fine = _reduced(_weighted(before, volume), features)
        both = torch.cat([fine, _weighted(features, volume)], dim=1)
        tokens: Tensor = self.project(both.flatten(2).transpose(1, 2))
        return tokens


def _box_means(volume: Tensor) -> list[Tensor]:
    """The volume, and its means over ever larger boxes."""
    levels = [volume]
    for _ in range(BLURS):
        levels.append(functional.avg_pool3d(levels[-1], 3, 1, 1))
    return levels


def _weighted(features: Tensor, volume: Tensor) -> Tensor:
    """Features times the volume's share in their cell: the mean over cells is one over it."""
    weights = _reduced(volume.clamp_min(0).mean(dim=1, keepdim=True), features) + LEAST
    return features * weights / weights.mean(dim=(2, 3, 4), keepdim=True)


def _reduced(cells: Tensor, like: Tensor) -> Tensor:
    """Average cells `(B, C, D, H, W)` to the grid of `like`."""
    depth, height, width = like.shape[2:]
    return functional.adaptive_avg_pool3d(cells, (depth, height, width))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolved(width, width),
            nn.Conv3d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm3d(width),
        )
        self.last = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.last(features + self.body(features))
        return result


def _convolved(before: int, after: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(before, after, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm3d(after),
        nn.ReLU(),
    )
