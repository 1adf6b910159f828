"""Random transforms of tiles and volumes, on tensors, seeded by the caller's generator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from cdt_train.encoders.conv2d import unit_scale


def augment_tiles(tiles: Tensor, channel_dropout: float, generator: Generator) -> Tensor:
    """Flip, turn, zoom and re-stain tiles, each on its own.

    Args:
        tiles: `(B, M, S, S)`, uint8 in 0 to 255 or float in 0 to 1.
        channel_dropout: chance that one channel of a tile goes missing.
        generator: source of every random number.

    Returns:
        `(B, M, S, S)` float32, 0 to 1.
    """
    unit = unit_scale(tiles)
    count, channels = unit.shape[:2]
    moved = _turned(_zoomed(unit, generator), generator)
    gain = torch.exp(0.2 * torch.randn(count, channels, 1, 1, generator=generator))
    offset = 0.01 * torch.randn(count, channels, 1, 1, generator=generator)
    stained = (moved * gain + offset).clamp(0.0, 1.0)
    if channel_dropout > 0:
        stained = stained * _one_missing(count, channels, channel_dropout, generator)
    return stained


def paired_views(volumes: Tensor, generator: Generator) -> Tensor:
    """Cut one random sub-volume of each volume and show it twice, changed each time.

    Where the sub-volume lies is what the two views share: the box moves and grows a little between
    them, either may be mirrored, re-windowed and noisy. Views have half the in-plane size, a
    quarter of the work; the encoder takes any size.

    Args:
        volumes: `(B, W, D, S, S)`, -1 to 1.
        generator: source of every random number.

    Returns:
        `(2 B, W, D, S / 2, S / 2)` float32, -1 to 1; rows i and B + i are views of one sub-volume.
    """
    count, windows, depth, height, width = volumes.shape
    zoom = (0.4 + 0.3 * torch.rand(count, 3, generator=generator)).repeat(2, 1)
    place = (2 * torch.rand(count, 3, generator=generator) - 1).repeat(2, 1)
    zoom = zoom * (0.9 + 0.2 * torch.rand(2 * count, 3, generator=generator))
    shift = (1 - zoom) * place + 0.05 * torch.randn(2 * count, 3, generator=generator)
    mirror = torch.where(torch.rand(2 * count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(2 * count, 3, 4)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 2, 2] = zoom[:, 0] * mirror, zoom[:, 1], zoom[:, 2]
    theta[:, :, 3] = shift
    small = [2 * count, windows, depth, height // 2, width // 2]
    grid = functional.affine_grid(theta, small, align_corners=False)
    pairs = volumes.repeat(2, 1, 1, 1, 1)
    moved = functional.grid_sample(pairs, grid, padding_mode="border", align_corners=False)
    shape = (2 * count, 1, 1, 1, 1)
    gain = 1 + 0.1 * torch.randn(shape, generator=generator)
    offset = 0.1 * torch.randn(shape, generator=generator)
    noise = 0.03 * torch.randn(moved.shape, generator=generator)
    return (moved * gain + offset + noise).clamp(-1.0, 1.0)


def _zoomed(tiles: Tensor, generator: Generator) -> Tensor:
    """Blow a random square of 85 to 100 % of the side up to the whole tile.

    One square for the batch: resampling each on its own would cost as much as the encoder.
    """
    size = tiles.shape[-1]
    side = int(size * (0.85 + 0.15 * torch.rand(1, generator=generator).item()))
    top, left = torch.randint(0, size - side + 1, (2,), generator=generator).tolist()
    square = tiles[:, :, top : top + side, left : left + side]
    return functional.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)


def _turned(tiles: Tensor, generator: Generator) -> Tensor:
    """Give each tile one of the eight orientations of a square."""
    turns = torch.randint(0, 4, (len(tiles),), generator=generator).tolist()
    mirrors = torch.randint(0, 2, (len(tiles),), generator=generator).tolist()
    placed = [
        torch.rot90(tile.flip(-1) if mirror else tile, turn, (-2, -1))
        for tile, turn, mirror in zip(tiles, turns, mirrors, strict=True)
    ]
    return torch.stack(placed)


def _one_missing(count: int, channels: int, chance: float, generator: Generator) -> Tensor:
    which = torch.randint(0, channels, (count,), generator=generator)
    hit = torch.rand(count, generator=generator) < chance
    mask = functional.one_hot(which, channels).float() * hit[:, None]
    return (1 - mask)[:, :, None, None]
