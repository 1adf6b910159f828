"""Random transforms of volumes, one resampling for a whole batch, seeded by the generator."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

MASK_SHARE = 0.08
"""Least share of a shape's voxels that lie wholly within; of images fewer are at the top."""

HU_RANGE = (-1000.0, 1000.0)

TURN = math.radians(8.0)
"""Standard deviation of the small rotation about each axis."""

SCALE = 0.03
"""Standard deviation of the logarithm of the zoom: size itself may be what tells the classes."""

SHIFT = 0.05
"""Standard deviation of the shift, as a share of half a side."""


def unit_range(volumes: Tensor) -> Tensor:
    """Bring uint8 images, and int16 ones as HU of -1000 to 1000, to 0 to 1; float ones stay."""
    if volumes.dtype == torch.uint8:
        return volumes.float() / 255.0
    if volumes.dtype == torch.int16:
        return (volumes.float().clamp(*HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
    return volumes.float()


def is_mask(volumes: Tensor) -> bool:
    """Tell whether volumes are shapes: much of what is not 0 has one same, the highest value.

    Not all of it: masks that were made smaller have shares of it along their surface.
    """
    inside = volumes[volumes != 0]
    if len(inside) == 0 or volumes.amin() < 0:
        return False
    return bool((inside == inside.amax()).float().mean() > MASK_SHARE)


def augment_volumes(volumes: Tensor, *, mask: bool, generator: Generator) -> Tensor:
    """Mirror, turn, shift and zoom volumes, each on its own; change the intensities of images.

    Right-angle turns swap axes of equal length only: unequal ones have unequal spacing.

    Args:
        volumes: `(B, C, D, H, W)`, uint8 in 0 to 255 or float.
        mask: they are shapes, not images: no change of intensity.
        generator: source of every random number.

    Returns:
        `(B, C, D, H, W)` float32; uint8 came to 0 to 1.
    """
    unit = unit_range(volumes)
    exact = _signed_permutations(len(unit), unit.shape[2:], generator)
    theta = torch.zeros(len(unit), 3, 4)
    theta[:, :, :3] = torch.bmm(exact, _small_affine(len(unit), unit.shape[2:], generator))
    theta[:, :, 3] = SHIFT * torch.randn(len(unit), 3, generator=generator)
    grid = functional.affine_grid(theta, list(unit.shape), align_corners=False)
    padding = "zeros" if mask else "border"
    moved = functional.grid_sample(unit, grid, padding_mode=padding, align_corners=False)
    return moved if mask else _relit(moved, generator)


def mirrored_views(images: Tensor) -> list[Tensor]:
    """Every combination of mirrored axes of images `(B, C, ...)`: 4 in 2D, 8 in 3D."""
    axes = range(2, images.ndim)
    return [
        images.flip(chosen) if chosen else images
        for count in range(len(axes) + 1)
        for chosen in itertools.combinations(axes, count)
    ]


def _signed_permutations(count: int, shape: torch.Size, generator: Generator) -> Tensor:
    """One matrix a volume that swaps axes of equal length and mirrors any, `(B, 3, 3)`.

    Rows and columns are in the order of `affine_grid`: x, y, z.
    """
    lengths = tuple(reversed(shape))
    allowed = [
        order
        for order in itertools.permutations(range(3))
        if all(lengths[axis] == lengths[place] for place, axis in enumerate(order))
    ]
    matrices = torch.eye(3)[torch.tensor(allowed)]  # (P, 3, 3)
    which = torch.randint(0, len(allowed), (count,), generator=generator)
    signs = 2.0 * torch.randint(0, 2, (count, 3, 1), generator=generator) - 1.0
    return matrices[which] * signs


def _small_affine(count: int, shape: torch.Size, generator: Generator) -> Tensor:
    """A zoom, and a small turn in each plane of equal axes, `(B, 3, 3)`, counted in voxels."""
    sides = torch.tensor(tuple(reversed(shape)), dtype=torch.float32)
    turn = torch.eye(3).repeat(count, 1, 1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        angles = TURN * torch.randn(count, generator=generator)
        if sides[first] == sides[second]:
            turn = turn @ _about(angles, first, second)
    zoom = torch.exp(SCALE * torch.randn(count, 1, 1, generator=generator))
    return zoom * turn * (sides[None, None, :] / sides[None, :, None])


def _about(angles: Tensor, first: int, second: int) -> Tensor:
    """Turn in the plane of two axes, `(B, 3, 3)`."""
    matrix = torch.eye(3).repeat(len(angles), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angles.cos()
    matrix[:, first, second], matrix[:, second, first] = -angles.sin(), angles.sin()
    return matrix


def _relit(volumes: Tensor, generator: Generator) -> Tensor:
    shape = (len(volumes), 1, 1, 1, 1)
    gain = 1 + 0.1 * torch.randn(shape, generator=generator)
    offset = 0.05 * torch.randn(shape, generator=generator)
    noise = 0.02 * torch.randn(volumes.shape, generator=generator)
    return volumes * gain + offset + noise
