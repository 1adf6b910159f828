"""Diseases of the phantom's lungs: two types, plain to see, no two patients alike.

    effusion    most of one lung or all of it under fluid, what is left of it dense
    emphysema   both lungs clear and darker, with bullae; in half the patients one large mass

Each type comes on either side, in many sizes and densities, in the same chests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdt_train.data.phantom_ct import Finding, Grid
from cdt_train.data.phantom_noise import Image

CT_TYPES = ("effusion", "emphysema")

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Effusion:
    """Fluid around one lung of a patient on the back.

    Attributes:
        side: 1 for the patient's left, -1 for the right.
        share: Of that lung's volume that is fluid; 1 leaves no air.
        slope: Millimetres that the fluid stands higher per millimetre towards the feet.
        hu: Of the fluid.
        collapse: HU that the rest of the lung is denser.
    """

    side: int
    share: float
    slope: float
    hu: float
    collapse: float

    def __call__(self, hu: Image, grid: Grid, lungs: Mask) -> None:
        """Paints it."""
        lung = lungs & (self.side * grid.x > 0)
        low = grid.y - np.float32(self.slope) * grid.z
        level = np.quantile(np.broadcast_to(low, hu.shape)[lung], 1.0 - self.share)
        hu[lung] += np.float32(self.collapse)
        np.copyto(hu, np.float32(self.hu), where=lung & (low >= level))


@dataclass(frozen=True)
class Emphysema:
    """Lungs that lost tissue.

    Attributes:
        loss: HU that they are darker.
        bullae: `(n, 4)` z, y, x and radius of each, in mm.
        mass: `(m, 4)` the same of the balls that make up a mass; none for no mass.
        hu: Of the mass.
    """

    loss: float
    bullae: Floats
    mass: Floats
    hu: float

    def __call__(self, hu: Image, grid: Grid, lungs: Mask) -> None:
        """Paints it."""
        hu[lungs] -= np.float32(self.loss)
        for value, balls in ((-985.0, self.bullae), (self.hu, self.mass)):
            for z, y, x, radius in balls:
                ball = grid.ball((z, y, x), (radius, radius, radius)) < 1
                np.copyto(hu, np.float32(value), where=ball & lungs)


def draw_finding(rng: np.random.Generator, ct_type: str) -> Finding:
    """Draws a disease of one of `CT_TYPES`."""
    return _effusion(rng) if ct_type == "effusion" else _emphysema(rng)


def _side(rng: np.random.Generator) -> int:
    return int(rng.choice([-1, 1]))


def _effusion(rng: np.random.Generator) -> Effusion:
    return Effusion(
        side=_side(rng),
        share=min(1.0, rng.uniform(0.6, 1.15)),
        slope=rng.uniform(0.1, 0.7),
        hu=rng.uniform(0, 40),
        collapse=rng.uniform(0, 150),
    )


def _emphysema(rng: np.random.Generator) -> Emphysema:
    number = int(rng.integers(4, 15))
    place = rng.uniform((-45, -50, 45), (60, 50, 110), (number, 3))
    place[:, 2] *= rng.choice([-1, 1], number)
    radius = rng.uniform(7, 20, (number, 1))
    return Emphysema(
        loss=rng.uniform(20, 80),
        bullae=np.hstack([place, radius]),
        mass=_mass(rng) if rng.random() < 0.5 else np.empty((0, 4)),
        hu=rng.uniform(10, 70),
    )


def _mass(rng: np.random.Generator) -> Floats:
    """A lobed lump: one ball and smaller ones on its surface."""
    radius = rng.uniform(20, 32)
    centre = rng.uniform((-35, -35, 60), (40, 35, 90)) * (1, 1, _side(rng))
    lobes = rng.normal(0, 1, (5, 3))
    lobes *= 0.8 * radius / np.linalg.norm(lobes, axis=1, keepdims=True)
    radii = np.append(radius, rng.uniform(0.35, 0.6, 5) * radius)
    return np.column_stack([np.vstack([centre, centre + lobes]), radii])
