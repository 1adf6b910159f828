"""Phantom multiplex tiles whose two classes differ in the arrangement of cells alone.

Both classes draw the positions, the counts and the brightness of their cells from the same
distributions, so no histogram tells them apart. What differs is which cell stands where:

    tumor_stroma    tumour in compact nests; T cells keep to the stroma between them; PD-L1
                    anywhere in the nests
    invasion_front  one ragged border with strands and single tumour cells ahead of it; T cells
                    crowd along the border; PD-L1 brightest there

A share of the tiles lies between the two, as regions of real tumours do; `mixing` makes it larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.markers import MARKERS
from cdt_train.data.phantom_noise import Image, gaussian_blur, smooth_field

CHANNELS = MARKERS
CLASSES = ("invasion_front", "tumor_stroma")
SIZE = 256
MPP = 0.5

_REACH = 14  # pixels from a cell's middle to the edge of what is painted of it
_SHOT = 0.03  # noise of the light itself: grey levels per root of a grey level

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Stain:
    """What one patient's staining and scanning do to every tile of that patient.

    Attributes:
        gain: `(6,)` grey levels of a cell of brightness 1.
        background: `(6,)` grey levels where there is no cell.
        noise: `(6,)` standard deviation of the camera's noise in grey levels.
        blur: Standard deviation of the point spread in pixels.
        spacing: Mean distance of cells in pixels.
        disorder: 0 to 1, how many T cells ignore the border.
    """

    gain: Floats
    background: Floats
    noise: Floats
    blur: float
    spacing: float
    disorder: float


@dataclass(frozen=True)
class Cells:
    """The cells of one tile, `n` of them.

    Attributes:
        position: `(n, 2)` y and x in pixels.
        tumour: `(n,)` PanCK-positive cells; the others are stroma.
        t_cell: `(n,)` CD3-positive cells, all of them in the stroma.
        brightness: `(n, 6)` of each cell in each channel, 0 where negative.
    """

    position: Floats
    tumour: Flags
    t_cell: Flags
    brightness: Floats


def patient_stain(rng: np.random.Generator) -> Stain:
    """Draws a patient's staining."""
    typical = np.array([72.0, 56.0, 62.0, 56.0, 68.0, 54.0])
    return Stain(
        gain=typical * np.exp(rng.normal(0.0, 0.2, 6)),
        background=rng.uniform(1.0, 8.0, 6),
        noise=rng.uniform(0.08, 0.18, 6),
        blur=rng.uniform(0.9, 1.4),
        spacing=rng.uniform(15.5, 17.5),
        disorder=rng.uniform(0.1, 0.6),
    )


def phantom_tile(
    rng: np.random.Generator, label: str, stain: Stain, mixing: float = 0.0
) -> NDArray[np.uint8]:
    """Draws one tile.

    Args:
        rng: The source of everything that differs between tiles of one patient.
        label: One of `CLASSES`.
        stain: The patient's.
        mixing: 0 to 1, how far the tile's arrangement is drawn from what both classes share; at 1
            the classes don't differ.

    Returns:
        `(6, 256, 256)` uint8 in the order of `CHANNELS`.
    """
    cells = _cells(rng, label, stain, mixing)
    return _render(rng, cells, stain)


def _cells(rng: np.random.Generator, label: str, stain: Stain, mixing: float) -> Cells:
    position = _positions(rng, stain.spacing)
    other = _other_share(rng, mixing)
    front = other if label == "tumor_stroma" else 1.0 - other
    tumour = _tumour(rng, position, front)
    border = _border_distance(position, tumour)
    t_cell = _t_cells(rng, tumour, border, front, stain.disorder)
    brightness = _brightness(rng, tumour, t_cell, border, front)
    return Cells(position, tumour, t_cell, brightness)


def _other_share(rng: np.random.Generator, mixing: float) -> float:
    """The share of the other class's arrangement that a region shows; above 0.5 it misleads."""
    other = 0.58 * rng.beta(1.2, 1.9)
    if mixing > 0:
        other += mixing * (rng.uniform() - other)
    return float(other)


def _positions(rng: np.random.Generator, spacing: float) -> Floats:
    """A jittered hexagonal grid with gaps: cells hardly overlap, in either class."""
    rows = np.arange(-2 * _REACH, SIZE + 2 * _REACH, spacing * 0.87)
    columns = np.arange(-2 * _REACH, SIZE + 2 * _REACH, spacing)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    grid = np.stack([y.ravel(), x.ravel()], axis=1)
    grid += rng.normal(0.0, 0.17 * spacing, grid.shape) + rng.uniform(0, spacing, 2)
    kept = rng.random(len(grid)) < 0.93
    kept &= ((grid > -_REACH) & (grid < SIZE + _REACH)).all(axis=1)
    return grid[kept]


def _tumour(rng: np.random.Generator, position: Floats, front: float) -> Flags:
    """The cells where the arrangement's field is highest; how many does not depend on the class."""
    nests = _ranks(_nest_field(rng, position))
    border = _ranks(_front_field(rng, position))
    field = (1 - front) * nests + front * border
    n_tumour = round(len(position) * rng.uniform(0.38, 0.56))
    tumour = _highest(field, n_tumour)
    return _dispersed(rng, position, tumour, rate=0.26 * front)


def _nest_field(rng: np.random.Generator, position: Floats) -> Floats:
    """High inside round islands: the nearest centre counts, as if each grew from a seed."""
    n_nests = int(rng.integers(4, 8))
    centres = _spread(rng, n_nests)
    radius = rng.uniform(0.75, 1.25, n_nests)
    stretch = rng.uniform(0.75, 1.0, n_nests)
    turn = rng.uniform(0, np.pi, n_nests)
    offset = position[:, None, :] - centres[None, :, :]
    along = offset[..., 0] * np.cos(turn) + offset[..., 1] * np.sin(turn)
    across = offset[..., 1] * np.cos(turn) - offset[..., 0] * np.sin(turn)
    away = np.hypot(along * stretch, across / stretch) / radius
    field: Floats = -away.min(axis=1) + 3.0 * _at(smooth_field(rng, SIZE, 40.0), position)
    return field


def _spread(rng: np.random.Generator, count: int) -> Floats:
    """`(count, 2)` points that keep away from each other: the best of a few tries each."""
    points = rng.uniform(0, SIZE, (1, 2))
    while len(points) < count:
        tries = rng.uniform(0, SIZE, (12, 2))
        gaps = np.linalg.norm(tries[:, None] - points[None], axis=2).min(axis=1)
        points = np.vstack([points, tries[gaps.argmax()]])
    return points


def _front_field(rng: np.random.Generator, position: Floats) -> Floats:
    """High on one side of a line; fingers and bays make its border ragged."""
    turn = rng.uniform(0, 2 * np.pi)
    offset = position - SIZE / 2
    depth = offset[:, 0] * np.cos(turn) + offset[:, 1] * np.sin(turn)
    bays = 26.0 * _at(smooth_field(rng, SIZE, 60.0), position)
    fingers = 20.0 * _at(smooth_field(rng, SIZE, 20.0), position)
    field: Floats = depth + bays + fingers
    return field


def _dispersed(rng: np.random.Generator, position: Floats, tumour: Flags, rate: float) -> Flags:
    """Moves single tumour cells into the stroma, fewer the farther from the border."""
    n_moved = round(rate * tumour.sum())
    if n_moved == 0:
        return tumour
    border = _border_distance(position, tumour)
    leaving = _pick(rng, np.where(tumour, np.exp(-border / 40.0), 0.0), n_moved)
    landing = _pick(rng, np.where(tumour, 0.0, np.exp(-border / 35.0)), n_moved)
    return (tumour & ~leaving) | landing


def _t_cells(
    rng: np.random.Generator, tumour: Flags, border: Floats, front: float, disorder: float
) -> Flags:
    """As many T cells in both classes; they shun the tumour or crowd along its border."""
    shunning = 1.0 / (1.0 + np.exp(-(border - 27.0) / 4.5))
    crowding = np.exp(-((border / 23.0) ** 2))
    rule = (1 - front) * shunning + front * crowding
    weight = np.where(tumour, 0.0, (1 - disorder) * rule + disorder * 0.4)
    n_t_cells = round(rng.uniform(0.16, 0.30) * len(tumour))
    return _pick(rng, weight, n_t_cells)


def _brightness(
    rng: np.random.Generator, tumour: Flags, t_cell: Flags, border: Floats, front: float
) -> Floats:
    """`(n, 6)` brightness of the cells; drawn without a look at the class, then handed out."""
    count = len(tumour)
    brightness = np.exp(rng.normal(0.0, 0.22, (count, len(CHANNELS))))
    brightness[~tumour, 1] = 0.0
    brightness[~t_cell, 2] = 0.0
    cytotoxic = _pick(rng, t_cell.astype(float), round(rng.uniform(0.35, 0.6) * t_cell.sum()))
    rest = (t_cell & ~cytotoxic).astype(float)
    regulatory = _pick(rng, rest, round(rng.uniform(0.35, 0.7) * rest.sum()))
    brightness[~cytotoxic, 3] = 0.0
    brightness[~regulatory, 4] = 0.0
    brightness[:, 5] = _pdl1(rng, tumour, border, front)
    return brightness


def _pdl1(rng: np.random.Generator, tumour: Flags, border: Floats, front: float) -> Floats:
    """PD-L1 of the tumour cells: one distribution, brightest at the border of a front."""
    values = np.zeros(len(tumour))
    drawn = np.sort(rng.gamma(1.2, 0.55, int(tumour.sum())))
    closeness = -front * border[tumour] / 20.0 + rng.normal(0.0, 0.8, len(drawn))
    values[np.flatnonzero(tumour)[np.argsort(closeness)]] = drawn
    return np.clip(values, 0.0, 2.5)


def _border_distance(position: Floats, tumour: Flags) -> Floats:
    """Distance in pixels of each cell to the nearest cell of the other kind."""
    gaps = np.linalg.norm(position[tumour][:, None] - position[~tumour][None], axis=2)
    distance = np.empty(len(position))
    distance[tumour] = gaps.min(axis=1)
    distance[~tumour] = gaps.min(axis=0)
    return distance


def _at(field: Image, position: Floats) -> Floats:
    pixel = np.clip(position.round().astype(int), 0, SIZE - 1)
    values: Floats = field[pixel[:, 0], pixel[:, 1]].astype(float)
    return values


def _ranks(values: Floats) -> Floats:
    ranks = np.empty(len(values))
    ranks[np.argsort(values)] = np.linspace(0.0, 1.0, len(values))
    return ranks


def _highest(values: Floats, count: int) -> Flags:
    flags = np.zeros(len(values), bool)
    flags[np.argsort(values)[len(values) - count :]] = True
    return flags


def _pick(rng: np.random.Generator, weight: Floats, count: int) -> Flags:
    """`count` different cells, likelier where the weight is higher, never where it is 0."""
    count = min(count, int((weight > 0).sum()))
    with np.errstate(divide="ignore"):
        key = np.log(weight) + rng.gumbel(size=len(weight))
    return _highest(key, count)


def _render(rng: np.random.Generator, cells: Cells, stain: Stain) -> NDArray[np.uint8]:
    """Paints nuclei and the stained parts of cells, then what microscope and camera add."""
    image = gaussian_blur(_paint(rng, cells), stain.blur)
    image *= _column(stain.gain)
    for channel, background in enumerate(stain.background):
        image[channel] += background * (1.0 + 0.25 * smooth_field(rng, SIZE, 70.0))
    spread = np.sqrt(_SHOT**2 * image + _column(stain.noise) ** 2)
    image += spread * rng.standard_normal(image.shape, np.float32)
    return np.clip(image.round(), 0, 255).astype(np.uint8)


def _column(per_channel: Floats) -> Image:
    return per_channel.astype(np.float32)[:, None, None]


def _paint(rng: np.random.Generator, cells: Cells) -> Image:
    """`(6, 256, 256)` float32, the brightest cell winning where two meet."""
    size = SIZE + 2 * _REACH
    pixel, distance, angle = _patches(cells.position, size)
    radius = _outline(rng, cells, angle)
    nucleus = _disc(distance - radius)
    body = _disc(distance - 1.45 * radius)
    membrane = np.exp(-(((distance - 1.35 * radius) / 1.5) ** 2))
    parts = (nucleus, np.maximum(body - 0.75 * nucleus, 0.0), membrane, membrane, nucleus, membrane)
    brightness = cells.brightness.astype(np.float32)
    image = np.zeros((len(CHANNELS), size * size), np.float32)
    for channel, part in enumerate(parts):
        shown = brightness[:, channel] > 0
        value = part[shown] * brightness[shown, channel, None, None]
        np.maximum.at(image[channel], pixel[shown].ravel(), value.ravel())
    whole = image.reshape(len(CHANNELS), size, size)
    return whole[:, _REACH:-_REACH, _REACH:-_REACH]


def _patches(position: Floats, size: int) -> tuple[NDArray[np.intp], Image, Image]:
    """The 29 x 29 pixels around each cell: place in the flat image, distance in pixels, angle."""
    steps = np.arange(-_REACH, _REACH + 1)
    centre = position.round().astype(np.intp)
    y = (centre[:, 0, None] + steps + _REACH).clip(0, size - 1)
    x = (centre[:, 1, None] + steps + _REACH).clip(0, size - 1)
    away = (centre - position).astype(np.float32)[:, :, None] + steps.astype(np.float32)
    dy, dx = away[:, 0, :, None], away[:, 1, None, :]
    return y[:, :, None] * size + x[:, None, :], np.hypot(dy, dx), np.arctan2(dy, dx)


def _outline(rng: np.random.Generator, cells: Cells, angle: Image) -> Image:
    """Radius of the nucleus in each direction: large and round in tumour, small in T cells."""
    count = len(cells.tumour)
    mean = np.where(cells.tumour, 5.6, np.where(cells.t_cell, 4.2, 4.5))
    mean = _column(mean * np.exp(rng.normal(0.0, 0.1, count)))
    spindle = ~cells.tumour & ~cells.t_cell
    stretch = np.where(spindle, rng.uniform(0.15, 0.4, count), rng.uniform(0.0, 0.15, count))
    turn = rng.uniform(0, np.pi, count)
    wave: Image = np.cos(2 * (angle - _column(turn)))
    return mean * (1 + _column(stretch) * wave)


def _disc(outside: Image) -> Image:
    """1 inside, 0 outside, soft over about a pixel; `outside` is the distance to the outline."""
    soft: Image = 1.0 / (1.0 + np.exp(np.clip(outside / 0.6, -30, 30)))
    return soft
