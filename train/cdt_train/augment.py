"""Random transforms of tiles and volumes, on tensors, seeded by the caller's generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from cdt_train.encoders.conv2d import unit_scale

HEADROOM = 0.8
"""Side of the cut square, as a share, at which a shrunk tile is neither blown up nor reduced."""


@dataclass(frozen=True)
class TileAugmentation:
    """Cut, turn, re-stain and blur tiles, each on its own.

    Attributes:
        size: side of what comes out.
        min_crop: least side of the random square, as a share of the tile's.
        rgb: bright-field tiles, whose stains absorb; else fluorescence, whose channels shine.
        stain_jitter: most relative change of an absorbing stain's optical density.
        stain_mix: spread of what each colour's optical density takes from each other's: stains and
            scanners of other laboratories mix colours in another way.
        gray: chance that a bright-field tile loses its colours, so that form counts too.
        channel_dropout: chance that one channel of a tile goes missing.
        blur: chance of a slight blur.
    """

    size: int
    min_crop: float
    rgb: bool
    stain_jitter: float = 0.3
    stain_mix: float = 0.0
    gray: float = 0.0
    channel_dropout: float = 0.0
    blur: float = 0.0

    def shrink(self, tiles: Tensor) -> Tensor:
        """Reduce tiles `(n, M, S, S)` once to a little more than `size`, without aliasing."""
        side = round(self.size / HEADROOM)
        if side >= tiles.shape[-1]:
            return tiles
        parts = [_reduced(part, side) for part in torch.split(tiles, 64)]
        return torch.cat(parts)

    def __call__(self, tiles: Tensor, generator: Generator) -> Tensor:
        """Transform a batch.

        Args:
            tiles: `(B, M, S, S)` of `shrink`, uint8 in 0 to 255 or float in 0 to 1, on any device.
            generator: source of every random number, on the CPU, so that the numbers are the same
                on every device.

        Returns:
            `(B, M, size, size)` float32, 0 to 1, where `tiles` are.
        """
        moved = _placed(unit_scale(tiles), self.size, self.min_crop, generator)
        stain = self._absorbing if self.rgb else _shining
        changed = stain(moved, generator).clamp_(0.0, 1.0)
        if self.blur > 0:
            changed = _blurred(changed, self.blur, generator)
        if self.channel_dropout > 0:
            count, channels = changed.shape[:2]
            hidden = _one_missing(count, channels, self.channel_dropout, generator)
            changed = changed * hidden.to(changed.device)
        return changed

    def _absorbing(self, tiles: Tensor, generator: Generator) -> Tensor:
        """Change optical densities, each channel's and all together, then the contrast; in place.

        In place because these few operations on a whole batch are a third of a training step.
        """
        count, channels = tiles.shape[:2]
        factor = torch.ones(count, channels, 1, 1)
        for shape in ((count, channels, 1, 1), (count, 1, 1, 1)):
            factor = factor * (1 + self.stain_jitter * _symmetric(shape, generator))
        light = tiles.clamp_(min=1.0 / 255.0).log_().mul_(factor.to(tiles.device))
        if self.stain_mix > 0:
            drawn = torch.randn(count, channels, channels, generator=generator)
            mixing = (torch.eye(channels) + self.stain_mix * drawn).to(tiles.device)
            light = torch.matmul(mixing, light.flatten(2)).view_as(light)
        changed = light.exp_()
        middle = changed.mean(dim=(1, 2, 3), keepdim=True)
        contrast = (1 + 0.2 * _symmetric((count, 1, 1, 1), generator)).to(tiles.device)
        changed = changed.mul_(contrast).add_(middle * (1 - contrast))
        if self.gray > 0:
            chosen = _happens(count, self.gray, generator).to(tiles.device)
            changed = torch.where(chosen, changed.mean(dim=1, keepdim=True), changed)
        return changed


def paired_views(volumes: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Cut one random sub-volume of each volume and show it twice, changed each time.

    Where the sub-volume lies is what the two views share: the box moves and grows a little between
    them, either may be mirrored, re-windowed and noisy. Views have half the in-plane size, a
    quarter of the work; the encoder takes any size.

    Args:
        volumes: `(B, W, D, S, S)`, -1 to 1.
        generator: source of every random number.

    Returns:
        `(2 B, W, D, S / 2, S / 2)` float32, -1 to 1; rows i and B + i are views of one sub-volume.
        And `(2 B, 3)`, where the middle of each lies: distance from the middle of the volume along
        x, then y and z, in halves of the volume's size.
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
    places = torch.cat([shift[:, :1].abs(), shift[:, 1:]], dim=1)
    return jitter_ct(moved, generator), places


def stretch_cubes(cubes: Tensor, side: int, generator: Generator) -> Tensor:
    """Turn, shear, stretch and mirror cubes a little, each on its own, and take their middle.

    Patients differ in size and lie askew: what an encoder learns of two must hold for a third.

    Args:
        cubes: `(B, W, S, S, S)`.
        side: of what comes out, less than S.
        generator: source of every random number.

    Returns:
        `(B, W, side, side, side)`.
    """
    count = len(cubes)
    bent = torch.eye(3) + 0.05 * torch.randn(count, 3, 3, generator=generator)
    scale = torch.exp(0.1 * torch.randn(count, 1, 3, generator=generator))
    mirror = torch.ones(count, 1, 3)
    mirror[:, 0, 0] = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 3, 4)
    theta[:, :, :3] = bent * scale * mirror * (side / cubes.shape[-1])
    shape = [count, cubes.shape[1], side, side, side]
    grid = functional.affine_grid(theta, shape, align_corners=False)
    return functional.grid_sample(cubes, grid, padding_mode="border", align_corners=False)


def jitter_ct(volumes: Tensor, generator: Generator) -> Tensor:
    """Change contrast and brightness of each volume `(B, W, D, H, W)` and add noise."""
    shape = (len(volumes), 1, 1, 1, 1)
    gain = 1 + 0.1 * torch.randn(shape, generator=generator)
    offset = 0.1 * torch.randn(shape, generator=generator)
    noise = 0.03 * torch.randn(volumes.shape, generator=generator)
    return (volumes * gain + offset + noise).clamp(-1.0, 1.0)


def _placed(tiles: Tensor, size: int, least: float, generator: Generator) -> Tensor:
    """Bring a random square of each tile, in a random one of eight orientations, to a size.

    Squares are uniform in area.
    """
    count = len(tiles)
    area = least**2 + (1 - least**2) * torch.rand(count, generator=generator)
    side, turn = area.sqrt(), torch.randint(0, 4, (count,), generator=generator)
    mirror = 2.0 * torch.randint(0, 2, (count,), generator=generator) - 1
    cosine, sine = (torch.tensor(values)[turn] for values in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = side * cosine * mirror, -side * sine
    theta[:, 1, 0], theta[:, 1, 1] = side * sine * mirror, side * cosine
    theta[:, :, 2] = (1 - side)[:, None] * _symmetric((count, 2), generator)
    shape = [count, tiles.shape[1], size, size]
    grid = functional.affine_grid(theta.to(tiles.device), shape, align_corners=False)
    return functional.grid_sample(tiles, grid, padding_mode="reflection", align_corners=False)


def _shining(tiles: Tensor, generator: Generator) -> Tensor:
    count, channels = tiles.shape[:2]
    gain = torch.exp(0.2 * torch.randn(count, channels, 1, 1, generator=generator))
    offset = 0.01 * torch.randn(count, channels, 1, 1, generator=generator)
    return tiles * gain.to(tiles.device) + offset.to(tiles.device)


def _blurred(tiles: Tensor, chance: float, generator: Generator) -> Tensor:
    chosen = _happens(len(tiles), chance, generator).to(tiles.device)
    padded = functional.pad(tiles, (1, 1, 1, 1), mode="reflect")
    return torch.where(chosen, functional.avg_pool2d(padded, 3, 1), tiles)


def _reduced(tiles: Tensor, side: int) -> Tensor:
    small = functional.interpolate(
        tiles.float(), size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small.round().to(torch.uint8) if tiles.dtype == torch.uint8 else small


def _happens(count: int, chance: float, generator: Generator) -> Tensor:
    """Which tiles something happens to, `(count, 1, 1, 1)`."""
    return torch.rand(count, 1, 1, 1, generator=generator) < chance


def _symmetric(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform random numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def _one_missing(count: int, channels: int, chance: float, generator: Generator) -> Tensor:
    which = torch.randint(0, channels, (count,), generator=generator)
    hit = torch.rand(count, generator=generator) < chance
    mask = functional.one_hot(which, channels).float() * hit[:, None]
    return (1 - mask)[:, :, None, None]
