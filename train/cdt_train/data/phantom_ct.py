"""Phantom CT of a chest: drawn in millimetres, sampled on the scanner's grid, in Hounsfield units.

Axes are those of a patient on the back: x to the patient's left, y to the back, z to the head.
Every organ is an inequality over `(z, y, x)`, painted over what was there before: fat, muscle,
lungs, mediastinum, bone, vessels, nodules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_train.data.phantom_noise import Image, gaussian_blur

SLICES = 24
SIZE = 256
SLICE_MM = 5.0

_AIR, _FAT, _SOFT, _LUNG = -1000.0, -100.0, 40.0, -850.0


@dataclass(frozen=True)
class Chest:
    """The measures of one patient; lengths in mm.

    Attributes:
        pixel_mm: Distance of the pixels of a slice of `SIZE` x `SIZE`.
        width: Half the body's width.
        depth: Half the body's depth, front to back.
        fat: Thickness of the fat under the skin.
        shift: `(2,)` y and x of the body's middle from the middle of the image.
        lung: Scale of the lungs, about 1.
        heart: Scale of the heart, about 1.
        contrast: HU that the blood has over the muscle.
        bone: HU of cortical bone.
        noise: Standard deviation of the noise in HU.
    """

    pixel_mm: float
    width: float
    depth: float
    fat: float
    shift: tuple[float, float]
    lung: float
    heart: float
    contrast: float
    bone: float
    noise: float

    @property
    def spine(self) -> float:
        """The y of the middle of the vertebral bodies."""
        return self.depth - self.fat - 42.0


@dataclass(frozen=True)
class Grid:
    """Coordinates in mm from the middle of the chest; they broadcast to `(D, H, W)`."""

    z: Image
    y: Image
    x: Image

    def disc(self, y: float, x: float, ry: float, rx: float) -> Image:
        """Below 1 inside an ellipse that is the same on every slice; `(1, H, W)`."""
        away: Image = np.hypot((self.y - y) / ry, (self.x - x) / rx)
        return away

    def ball(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Image:
        """Below 1 inside an ellipsoid; both arguments in the order z, y, x."""
        flat = self.disc(centre[1], centre[2], radii[1], radii[2])
        away: Image = np.hypot(flat, (self.z - centre[0]) / radii[0])
        return away


Finding = Callable[[Image, Grid, NDArray[np.bool_]], None]
"""Paints a disease: takes HU, their grid and where the lungs are; called before the mediastinum."""


def draw_chest(rng: np.random.Generator) -> Chest:
    """Draws a patient."""
    width = rng.uniform(150, 185)
    return Chest(
        pixel_mm=round(rng.uniform(1.55, 1.75), 4),
        width=width,
        depth=width * rng.uniform(0.66, 0.74),
        fat=rng.uniform(8, 24),
        shift=(rng.uniform(-12, 6), rng.uniform(-10, 10)),
        lung=rng.uniform(0.9, 1.06),
        heart=rng.uniform(0.88, 1.15),
        contrast=float(rng.choice([5.0, rng.uniform(80, 160)])),
        bone=rng.uniform(450, 700),
        noise=rng.uniform(9, 20),
    )


def phantom_ct(
    rng: np.random.Generator, chest: Chest, size: int = SIZE, finding: Finding | None = None
) -> NDArray[np.int16]:
    """Draws one series.

    Args:
        rng: The source of vessels, nodules and noise.
        chest: The patient.
        size: Pixels of a row and of a column; fewer of them are larger.
        finding: A disease of the lungs, if any.

    Returns:
        `(24, size, size)` HU, the slice nearest the head first.
    """
    grid = _grid(chest, size)
    hu = np.full((SLICES, size, size), _AIR, np.float32)
    _table(hu, grid, chest)
    _wall(hu, grid, chest)
    lungs = _lungs(hu, grid, chest, rng)
    if finding is not None:
        finding(hu, grid, lungs)
    _mediastinum(hu, grid, chest)
    _airways(hu, grid)
    _bones(hu, grid, chest)
    _vessels(hu, grid, chest, lungs, rng)
    _nodules(hu, grid, lungs, rng)
    hu = gaussian_blur(hu, 0.6) + _noise(rng, hu.shape, chest.noise)
    return np.clip(hu.round(), -1024, 3071).astype(np.int16)


def _grid(chest: Chest, size: int) -> Grid:
    pixel_mm = chest.pixel_mm * SIZE / size
    place = ((np.arange(size) - (size - 1) / 2) * pixel_mm).astype(np.float32)
    z = (((SLICES - 1) / 2 - np.arange(SLICES)) * SLICE_MM).astype(np.float32)
    y, x = place - chest.shift[0], place - chest.shift[1]
    return Grid(z[:, None, None], y[None, :, None], x[None, None, :])


def _table(hu: Image, grid: Grid, chest: Chest) -> None:
    """A curved shell of carbon below the back, with foam inside."""
    below = grid.y - (chest.depth + 6) + (grid.x / 60.0) ** 2
    inside = np.abs(grid.x) < 205
    _paint(hu, inside & (below > 0) & (below < 26), -930)
    _paint(hu, inside & (((below > 0) & (below < 3)) | ((below > 23) & (below < 26))), -250)


def _body(grid: Grid, chest: Chest, less: float) -> Image:
    """Below 1 inside the body without its outer `less` mm; squarer than an ellipse."""
    x = np.abs(grid.x) / np.float32(chest.width - less)
    y = np.abs(grid.y) / np.float32(chest.depth - less)
    return np.power(x, np.float32(2.5)) + np.power(y, np.float32(2.5))


def _wall(hu: Image, grid: Grid, chest: Chest) -> None:
    """Skin, fat, muscle."""
    _paint(hu, _body(grid, chest, 0.0) < 1, 10.0)
    _paint(hu, _body(grid, chest, 2.5) < 1, _FAT)
    _paint(hu, _body(grid, chest, chest.fat) < 1, _SOFT + 10)


def _lungs(hu: Image, grid: Grid, chest: Chest, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Two lungs, narrower towards the top, denser towards the back where the patient lies."""
    inner = chest.fat + 22
    room = _body(grid, chest, inner) < 1
    taper = chest.lung * (1.0 - 0.20 * np.clip(grid.z / 60.0, -0.5, 1.0) ** 2)
    side = chest.width * 0.47
    lungs = np.zeros(hu.shape, bool)
    for sign, scale in ((-1, 1.03), (1, 0.97)):
        ry, rx = (chest.depth - inner + 6) * taper * scale, (chest.width - inner) * 0.5 * taper
        lungs |= np.hypot((grid.y + 2) / ry, (grid.x - sign * side) / rx) < 1
    lungs &= room
    texture = gaussian_blur(rng.standard_normal(hu.shape, np.float32), 1.5)
    density = _LUNG + rng.uniform(-25, 25) + 0.35 * grid.y + 100.0 * texture
    hu[lungs] = density[lungs]
    return lungs


def _mediastinum(hu: Image, grid: Grid, chest: Chest) -> None:
    """Fat, then heart, aorta, superior vena cava and pulmonary trunk."""
    blood = _SOFT + chest.contrast
    deep = chest.depth
    _paint(hu, grid.disc(-0.05 * deep, 0, 0.62 * deep, 0.17 * chest.width) < 1, _FAT + 20)
    size = chest.heart * chest.width
    heart = grid.ball((-42, -0.22 * deep, 0.14 * chest.width), (62, 0.30 * size, 0.37 * size))
    _paint(hu, heart < 1.06, _FAT)
    _paint(hu, heart < 1.0, _SOFT)
    cavity = grid.ball((-40, -0.24 * deep, 0.18 * chest.width), (40, 0.15 * size, 0.17 * size))
    _paint(hu, cavity < 1, blood)
    above = grid.z > -12
    _paint(hu, (grid.disc(-0.25 * deep, -10, 15, 16) < 1) & above, blood)
    _paint(hu, (grid.disc(-0.22 * deep, -36, 9, 8) < 1) & above, blood)
    _paint(hu, grid.ball((-4, -0.18 * deep, 18), (16, 13, 24)) < 1, blood)
    _paint(hu, grid.disc(chest.spine - 20, 26, 12, 12) < 1, blood)
    _paint(hu, grid.disc(chest.spine - 28, 6, 6, 8) < 1, _SOFT - 5)


def _airways(hu: Image, grid: Grid) -> None:
    """The trachea, and below its fork the two main bronchi."""
    fork = np.clip(12.0 - grid.z, 0.0, 42.0)
    for sign in (-1, 1):
        wall = np.hypot(grid.y - 8, (grid.x - sign * 0.95 * fork) * (1.0 + 0.004 * fork))
        radius = 9.0 - 0.06 * fork
        reach = grid.z > -30
        _paint(hu, (wall < radius + 2) & reach, _SOFT)
    for sign in (-1, 1):
        wall = np.hypot(grid.y - 8, (grid.x - sign * 0.95 * fork) * (1.0 + 0.004 * fork))
        _paint(hu, (wall < 9.0 - 0.06 * fork) & (grid.z > -30), -980)


def _bones(hu: Image, grid: Grid, chest: Chest) -> None:
    """Spine with its canal, ribs that slope down to the front, sternum, shoulder blades."""
    spine = chest.spine
    disc_space = np.abs((grid.z + 7) % 26 - 13) < 2.5
    body = grid.disc(spine, 0, 17, 20)
    _paint(hu, grid.disc(spine + 34, 0, 11, 6) < 1, 0.6 * chest.bone)
    _paint(hu, grid.disc(spine + 22, 0, 8, 30) < 1, 0.55 * chest.bone)
    _paint(hu, body < 1, chest.bone)
    _paint(hu, body < 0.86, 190.0)
    _paint(hu, (body < 0.95) & disc_space, 80.0)
    _paint(hu, grid.disc(spine + 22, 0, 7.5, 9) < 1, 25.0)
    _ribs(hu, grid, chest)
    front = -(chest.depth - chest.fat - 12)
    _paint(hu, grid.disc(front, 0, 6, 19) < 1, 0.6 * chest.bone)
    _paint(hu, grid.disc(front, 0, 3.5, 16) < 1, 150.0)
    for sign in (-1, 1):
        place = sign * chest.width * 0.62
        turn = (grid.x - place) * 0.45 * sign
        blade = np.hypot((grid.y - 0.66 * chest.depth + turn) / 4.0, (grid.x - place) / 34.0)
        _paint(hu, (blade < 1) & (grid.z > -10), 0.75 * chest.bone)


def _ribs(hu: Image, grid: Grid, chest: Chest) -> None:
    ring = _body(grid, chest, chest.fat + 11)
    shell = (ring < 1) & (_body(grid, chest, chest.fat + 20) > 1)
    marrow = (_body(grid, chest, chest.fat + 13) < 1) & (_body(grid, chest, chest.fat + 18) > 1)
    front = (chest.depth - grid.y) / (2 * chest.depth)
    phase = (grid.z + 105.0 * front + 9.0 * (grid.x > 0)) % 27.0
    rib = (phase < 10.5) & (np.abs(grid.x) > 26)
    _paint(hu, shell & rib, 0.8 * chest.bone)
    _paint(hu, marrow & rib & (phase > 2.5) & (phase < 8.0), 230.0)


def _vessels(
    hu: Image, grid: Grid, chest: Chest, lungs: NDArray[np.bool_], rng: np.random.Generator
) -> None:
    """Branches that leave each hilum and thin out towards the wall."""
    for sign in (-1, 1):
        hilum = np.array([-8.0, 4.0, sign * 0.20 * chest.width])
        for _ in range(34):
            reach = rng.uniform(0.3, 0.66) * chest.width
            heading = np.array(
                [rng.normal(0, 0.55), rng.normal(0, 0.6), sign * rng.uniform(0.3, 1)]
            )
            tip = hilum + heading / np.linalg.norm(heading) * reach
            radius = rng.uniform(2.2, 4.6)
            _tube(hu, grid, lungs, hilum, tip, radius)
            for part in rng.uniform(0.3, 0.8, 3):
                branch = hilum + (tip - hilum) * part
                aside = branch + rng.normal(0, 0.22 * reach, 3)
                _tube(hu, grid, lungs, branch, aside, 0.65 * radius)


def _tube(
    hu: Image,
    grid: Grid,
    inside: NDArray[np.bool_],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    radius: float,
) -> None:
    """A cone from `start` (z, y, x) to a thin `end`; only the box around it is looked at."""
    low, high = np.minimum(start, end) - radius - 2.5, np.maximum(start, end) + radius + 2.5
    box = tuple(
        slice(*_span(axis.ravel(), low[i], high[i]))
        for i, axis in enumerate((grid.z, grid.y, grid.x))
    )
    z, y, x = grid.z[box[0]], grid.y[:, box[1]], grid.x[:, :, box[2]]
    along = end - start
    offset = (z - start[0], y - start[1], x - start[2])
    part = sum(o * a for o, a in zip(offset, along, strict=True)) / float(along @ along)
    part = np.clip(part, 0.0, 1.0)
    away = sum((o - part * a) ** 2 for o, a in zip(offset, along, strict=True)) ** 0.5
    # thinner than a voxel, a vessel dims instead of breaking up
    filled = np.clip((radius * (1 - 0.65 * part) - away) / 1.5 + 0.5, 0.0, 1.0)
    view = hu[box]
    view += np.where(inside[box] & (view < _SOFT), filled * (_SOFT - view), 0).astype(np.float32)


def _span(axis: Image, low: float, high: float) -> tuple[int, int]:
    hit = np.flatnonzero((axis >= low) & (axis <= high))
    return (int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, 0)


def _nodules(hu: Image, grid: Grid, lungs: NDArray[np.bool_], rng: np.random.Generator) -> None:
    """None to three lumps in the lungs, some of them spiculated."""
    where = np.argwhere(lungs)
    for _ in range(int(rng.choice(4, p=[0.2, 0.4, 0.25, 0.15]))):
        index = where[rng.integers(len(where))]
        centre = np.array(
            [grid.z.ravel()[index[0]], grid.y.ravel()[index[1]], grid.x.ravel()[index[2]]]
        )
        radius = rng.uniform(4.5, 15)
        shape = rng.uniform(0.8, 1.25, 3) * radius
        lump = grid.ball((centre[0], centre[1], centre[2]), (shape[0], shape[1], shape[2]))
        _paint(hu, (lump < 1) & lungs, rng.uniform(10, 60))
        for _ in range(int(rng.integers(0, 9))):
            spike = centre + rng.normal(0, 1.0, 3) * radius * 1.1
            _tube(hu, grid, lungs, centre, spike, 0.3 * radius)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Image:
    """Noise with the grain of a filtered back projection: no slow part, little of the fastest."""
    white = rng.standard_normal(shape, np.float32)
    fine = gaussian_blur(white, 0.7)
    grain = fine - gaussian_blur(fine, 2.0)
    return grain * np.float32(deviation / grain.std())


def _paint(hu: Image, where: NDArray[np.bool_], value: float) -> None:
    np.copyto(hu, np.float32(value), where=where)
