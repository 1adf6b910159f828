"""A compact tile encoder that trains from nothing on a small machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

GRID = 32
"""Pixels of the tile's side that one token stands for."""


class PathEncoder(nn.Module):
    """A strided stem, three strided stages of two convolutions, tokens of the last two.

    Plain on purpose: at the same cost, filters that are turned with the tile learnt less (5-shot on
    lung tiles .93 to .94 against .95). Nothing is pooled before the last stage but one: what tells
    tumours apart is fine. Scaling and standardising happen inside, so that the graph takes in
    bytes. It takes tiles of any size that is a multiple of 32, so that training can work on small
    cuttings.

    Args:
        channels: M, channels of a tile.
        widths: channels of the stem and of the three stages.
        feature_dim: C, width of a token.
    """

    scales = 2
    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, widths: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.stem = _convolution(channels, widths[0], kernel=5, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _convolution(before, after, kernel=3, stride=2),
                _convolution(after, after, kernel=3),
            )
            for before, after in itertools.pairwise(widths)
        )
        self.project = nn.ModuleList(
            nn.Linear(width, feature_dim) for width in widths[-self.scales :]
        )

    @torch.no_grad()
    def standardise_by(self, tiles: Tensor) -> None:
        """Take mean and spread of each channel from training tiles `(B, M, S, S)`."""
        moments = torch.zeros(2, tiles.shape[1], dtype=torch.float64)
        for part in torch.split(tiles, 64):  # a whole data set in float32 may not fit
            scaled = unit_scale(part).double()
            moments += torch.stack([scaled.sum(dim=(0, 2, 3)), scaled.square().sum(dim=(0, 2, 3))])
        mean, square = moments / (tiles.numel() / tiles.shape[1])
        spread = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(spread[:, None, None])

    def forward(self, tile: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tile: `(B, M, S, S)`, uint8 in 0 to 255 or float in 0 to 1.

        Returns:
            `(B, N, C)` tokens: (S / 32) squared of the last stage but one, then as many of the
            last, each in rows from the top left.
        """
        features = self.stem((unit_scale(tile).to(self.mean.dtype) - self.mean) / self.std)
        side = tile.shape[-1] // GRID
        tokens = []
        for position, stage in enumerate(self.stages):
            features = stage(features)
            scale = position - len(self.stages) + self.scales
            if scale >= 0:
                pooled = functional.avg_pool2d(features, features.shape[-1] // side)
                tokens.append(self.project[scale](pooled.flatten(2).transpose(1, 2)))
        return torch.cat(tokens, dim=1)


def unit_scale(tile: Tensor) -> Tensor:
    """Bring uint8 tiles to 0 to 1; float ones are there already."""
    return tile.float() / 255.0 if tile.dtype == torch.uint8 else tile.float()


def _convolution(before: int, after: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())
