"""Smooth random fields, in numpy alone: shared by the phantom's CT and its tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Blurs the last two axes; the edge pixel stands for what lies outside.

    Args:
        image: `(..., H, W)` float32.
        sigma: Pixels.
    """
    reach = max(1, round(3 * sigma))
    steps = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (-2, -1):
        image = _convolve(image, kernel, axis)
    return image


def _convolve(image: Image, kernel: Image, axis: int) -> Image:
    reach, size = len(kernel) // 2, image.shape[axis]
    padding = [(0, 0)] * image.ndim
    padding[axis] = (reach, reach)
    padded = np.pad(image, padding, mode="edge")
    total = np.zeros_like(image)
    for offset, weight in enumerate(kernel):
        shifted = slice(offset, offset + size)
        total += weight * (padded[..., shifted] if axis == -1 else padded[..., shifted, :])
    return total


def smooth_field(rng: np.random.Generator, size: int, scale: float) -> Image:
    """A Gaussian random field of zero mean and unit deviation.

    Args:
        rng: The source of randomness.
        size: Height and width in pixels.
        scale: Length of correlation in pixels; drawn on a coarse grid, then interpolated.
    """
    knots = max(4, int(np.ceil(size / scale)) + 3)
    coarse = gaussian_blur(rng.standard_normal((knots, knots), np.float32), 0.7)
    weights = _interpolation(size, knots)
    field = np.asarray(weights @ coarse @ weights.T, np.float32)
    field = field - np.float32(field.mean())
    unit: Image = field / np.float32(field.std())
    return unit


def _interpolation(size: int, knots: int) -> Image:
    """`(size, knots)` weights of a cubic B-spline, so that no grid shows in the field."""
    place = np.linspace(1.0, knots - 2.0, size)[:, None] - np.arange(knots)[None, :]
    away = np.abs(place)
    near = 2 / 3 - away**2 + away**3 / 2
    far = np.clip(2 - away, 0, None) ** 3 / 6
    return np.where(away < 1, near, far).astype(np.float32)
