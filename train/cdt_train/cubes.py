"""Small cubes cut from fine CT volumes, with the place that each came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32
"""Voxels of a cube's side: 64 mm at 2 mm."""

ROOM = 48
"""Voxels of the side that is cut, so that a cube can be turned and stretched within it."""

SHIFT = 6
"""Most voxels, along an axis, between the two cubes of a pair."""

UNIT_VOXELS = 50.0
"""Voxels of 2 mm in the decimetre that places are measured in."""

TISSUE_HU = -800
TISSUE_SHARE = 0.05
ATTEMPTS = 20


@dataclass(frozen=True, eq=False)
class Cubes:
    """Cubes and where they lie.

    Attributes:
        pixels: `(B, 1, 48, 48, 48)` float32 HU: the cube's 32 voxels, and room around them.
        places: `(B, 3)` in decimetres: z, y, and the distance from the middle of the volume along
            x, so that left and right are alike.
        volume: `(B,)` int64, which volume each was cut from; places compare within one alone.
    """

    pixels: Tensor
    places: Tensor
    volume: Tensor


def draw_pairs(volumes: Sequence[Tensor], count: int, rng: np.random.Generator) -> Cubes:
    """Draw `count` cubes and for each another close by; rows i and `count` + i are a pair.

    Every place is as likely, so that a volume of a few slices has few cubes; cubes that show next
    to nothing but air are drawn again.

    Args:
        volumes: `(D, H, W)` int16 HU at 2 mm each.
        count: of pairs.
        rng: source of every random number.
    """
    sizes = np.array([volume.numel() for volume in volumes], dtype=np.float64)
    which = rng.choice(len(volumes), size=count, p=sizes / sizes.sum())
    first = [_centre_with_tissue(volumes[v], rng) for v in which]
    second = [
        np.clip(centre + rng.integers(-SHIFT, SHIFT + 1, 3), 0, np.array(volumes[v].shape) - 1)
        for v, centre in zip(which, first, strict=True)
    ]
    centres, owners = [*first, *second], np.concatenate([which, which])
    pixels = [cut_cube(volumes[v], c, ROOM) for v, c in zip(owners, centres, strict=True)]
    middles = np.array([volumes[v].shape[2] / 2 for v in owners])
    places = np.array(centres, dtype=np.float32) / UNIT_VOXELS
    places[:, 2] = np.abs(places[:, 2] - middles / UNIT_VOXELS)
    return Cubes(
        torch.stack(pixels)[:, None].float(), torch.from_numpy(places), torch.from_numpy(owners)
    )


def cut_cube(volume: Tensor, centre: NDArray[np.int64], side: int = SIDE) -> Tensor:
    """Cut the cube around a voxel; beyond the volume its outermost voxels repeat.

    Args:
        volume: `(D, H, W)`.
        centre: z, y, x.
        side: voxels of its side.

    Returns:
        `(side, side, side)`.
    """
    axes = [
        torch.arange(int(c) - side // 2, int(c) + side // 2).clamp(0, size - 1)
        for c, size in zip(centre, volume.shape, strict=True)
    ]
    return volume[axes[0]][:, axes[1]][:, :, axes[2]]


def windowed(hu: Tensor, windows: Sequence[tuple[float, float]]) -> Tensor:
    """Bring HU `(B, 1, ...)` to -1 to 1 in each window: `(B, W, ...)`."""
    parts = [((hu - low) / (high - low) * 2 - 1).clamp(-1, 1) for low, high in windows]
    return torch.cat(parts, dim=1)


def _centre_with_tissue(volume: Tensor, rng: np.random.Generator) -> NDArray[np.int64]:
    shape = np.array(volume.shape)
    centre = rng.integers(0, shape)
    for _ in range(ATTEMPTS):
        near = cut_cube(volume, centre)
        if float((near > TISSUE_HU).float().mean()) > TISSUE_SHARE:
            break
        centre = rng.integers(0, shape)
    return centre
