"""From a tile or a CT to what a foundation encoder takes in, by its card alone.

Training, export and inference all call this module. Resizing is Pillow's on bytes, as the encoders'
own processors do it, so that inputs are equal to theirs pixel by pixel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.encoder_card import InputSpec, VolumeSpec
from cdt_runtime.errors import SeriesError, TileError
from cdt_runtime.preprocess import area_resize

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def image_input(pixels: Bytes, spec: InputSpec) -> Float:
    """Bring one image to the input of an encoder.

    Args:
        pixels: `(H, W, 3)` uint8, RGB, 0 to 255.
        spec: of the encoder.

    Returns:
        `(3, S, S)` or `(S, S, 3)` float32, as `spec.layout` says.

    Raises:
        TileError: not an RGB image of bytes.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise TileError(
            f"image of shape {pixels.shape} and {pixels.dtype}: foundation encoders take "
            f"(H, W, 3) uint8, RGB"
        )
    squared = _padded(pixels) if spec.pad else pixels
    sized = _sized(squared, spec)
    scaled = np.asarray(sized, np.float32) * np.float32(1 / 255)
    standard = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(standard if spec.layout == "NHWC" else standard.transpose(2, 0, 1))


def ct_slices(hu: Float, spec: VolumeSpec) -> Bytes:
    """Show slices of a CT as RGB images, each window a colour.

    Args:
        hu: `(D, H, W)` float32.
        spec: of the encoder: three windows.

    Returns:
        `(n, H, W, 3)` uint8, at most `spec.max_slices`, evenly spaced from first to last.

    Raises:
        SeriesError: not a volume of finite HU.
    """
    if hu.ndim != 3 or 0 in hu.shape or not np.isfinite(hu).all():
        raise SeriesError(f"volume of shape {hu.shape}: expected (D, H, W) of finite HU")
    chosen = hu[slice_places(len(hu), spec.max_slices)]
    channels = [
        (np.clip(chosen, low, high) - np.float32(low)) / np.float32(high - low)
        for low, high in spec.windows
    ]
    shown: Bytes = np.rint(np.stack(channels, axis=-1) * np.float32(255)).astype(np.uint8)
    return shown


def ct_volume(hu: Float, spacing_mm: tuple[float, float, float], spec: VolumeSpec) -> Float:
    """Bring a CT to the input of an encoder that takes it whole.

    It is resampled by exact box means (linear where it grows) to the encoder's voxels, where it has
    any, and its middle is cut out, or filled up with air.

    Args:
        hu: `(D, H, W)` float32; axes grow to the head, the back and the left.
        spacing_mm: of its voxels, `(z, y, x)`.
        spec: of the encoder.

    Returns:
        `(windows, *shape)` float32, 0 to 1, axes as `spec.orientation` says.

    Raises:
        SeriesError: not a volume of finite HU.
    """
    if spec.shape is None or hu.ndim != 3 or 0 in hu.shape or not np.isfinite(hu).all():
        raise SeriesError(f"volume of shape {hu.shape}: expected (D, H, W) of finite HU")
    turned = spec.orientation == "RAS"
    wanted = spec.shape[::-1] if turned else spec.shape
    if spec.spacing_mm is None:
        sized = area_resize(hu, wanted)
    else:
        target = spec.spacing_mm[::-1] if turned else spec.spacing_mm
        lengths = zip(hu.shape, spacing_mm, target, strict=True)
        shape = tuple(max(1, round(count * own / to)) for count, own, to in lengths)
        sized = _middle(area_resize(hu, shape), wanted, spec.windows[0][0])
    if turned:  # (z, y, x) that grow to S, P, L become (x, y, z) that grow to R, A, S
        sized = sized.transpose(2, 1, 0)[::-1, ::-1]
    channels = [(np.clip(sized, low, high) - low) / (high - low) for low, high in spec.windows]
    return np.ascontiguousarray(np.stack(channels), dtype=np.float32)


def _middle(volume: Float, shape: tuple[int, ...], air: float) -> Float:
    """Cut the middle out of a volume, or put it in the middle of air."""
    found = np.full(shape, air, np.float32)
    into, of = [], []
    for has, wants in zip(volume.shape, shape, strict=True):
        length = min(has, wants)
        into.append(slice((wants - length) // 2, (wants - length) // 2 + length))
        of.append(slice((has - length) // 2, (has - length) // 2 + length))
    found[tuple(into)] = volume[tuple(of)]
    return found


def slice_places(count: int, most: int | None) -> NDArray[np.int64]:
    """Choose slices, evenly spaced from the first to the last."""
    if most is None or count <= most:
        return np.arange(count)
    return np.rint(np.linspace(0, count - 1, most)).astype(np.int64)


def _sized(pixels: Bytes, spec: InputSpec) -> NDArray[Any]:
    """Resize to `(S, S, 3)`: bytes, or float where the encoder's own way gives them."""
    if spec.resize_to is not None:
        short = min(pixels.shape[:2])
        height, width = (int(side * spec.resize_to / short) for side in pixels.shape[:2])
        return _centre(_resized(pixels, (height, width), spec), spec.size)
    return _resized(pixels, (spec.size, spec.size), spec)


def _resized(pixels: Bytes, sides: tuple[int, int], spec: InputSpec) -> NDArray[Any]:
    if pixels.shape[:2] == sides:
        return pixels
    if spec.resize == "bilinear_plain":
        down, across = (_plain_matrix(n, to) for n, to in zip(pixels.shape, sides, strict=False))
        rows = np.tensordot(down, pixels.astype(np.float32), axes=(1, 0))
        columns: Float = np.tensordot(rows, across, axes=(1, 1)).transpose(0, 2, 1)
        return columns
    from PIL import Image

    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(Image.fromarray(pixels).resize(sides[::-1], filters[spec.resize]))


@lru_cache(maxsize=16)
def _plain_matrix(n_in: int, n_out: int) -> Float:
    """Weights of the two nearest samples between centres, whatever the scale; `(n_out, n_in)`."""
    places = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    weights = np.clip(1 - np.abs(places[:, None] - np.arange(n_in)[None]), 0, None)
    result: Float = weights.astype(np.float32)
    result.setflags(write=False)
    return result


def _padded(pixels: Bytes) -> Bytes:
    """Put the image in the middle of a black square."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def _centre(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]
