"""From a CT volume or a tile to what a model takes in. The only preprocessing in the project.

Training, export and inference all call this module, so they can't drift apart. What it does is
fixed by a `Preprocess`, which travels in the checkpoint and in the bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import BundleError, SeriesError, TileError
from cdt_runtime.plain import from_plain

if TYPE_CHECKING:
    from cdt_runtime.tile import Tile
    from cdt_runtime.volume import Volume

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Preprocess:
    """What a model takes in.

    Attributes:
        channels: names of the tile's channels, in the order that the model expects.
        image_size: height and width of a tile input, pixels.
        tile_dtype: "uint8" where the training tiles had 8 bits: 0 to 255, scaled inside the graph;
            "float32" where they had more: 0 to 1.
        tile_bits: significant bits of the training tiles' integer samples; a file that claims more
            without using them (12 bits in 16) is scaled by these.
        tile_mpp: microns a pixel of the tile input in training, or None where that is not known.
        fill_missing: whether training hid channels at random, so that a missing one may be zero.
        blank_std: a tile whose channels all have a standard deviation below this share of the full
            scale shows no tissue.
        ct_depth: slices of a CT input.
        slice_size: height and width of a CT input, pixels.
        hu_windows: one `(low, high)` in HU a channel of the CT input, mapped to -1 to 1.
        min_slices: a series with fewer slices is refused.
    """

    channels: tuple[str, ...]
    image_size: int = 224
    tile_dtype: Literal["uint8", "float32"] = "uint8"
    tile_bits: int = 8
    tile_mpp: float | None = None
    fill_missing: bool = False
    blank_std: float = 0.02
    ct_depth: int = 16
    slice_size: int = 128
    hu_windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0),)
    min_slices: int = 8

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Shape of one tile input, `(M, S, S)`."""
        return (len(self.channels), self.image_size, self.image_size)

    @property
    def ct_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a CT input, `(1, W, D, S, S)`."""
        return (1, len(self.hu_windows), self.ct_depth, self.slice_size, self.slice_size)

    @property
    def ct_means_shape(self) -> tuple[int, int, int]:
        """Shape of a volume that was brought to the size of a CT input, `(D, S, S)`."""
        return (self.ct_depth, self.slice_size, self.slice_size)

    @property
    def sha256(self) -> str:
        """Identity of the preprocessing: prototypes and cached tokens are bound to it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values, as JSON holds them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read back what `to_dict` gave.

        Raises:
            BundleError: a key is missing or unknown, or a value of another type or out of bounds.
        """
        made = from_plain(cls, values, "preprocessing spec")
        made._check()
        return made

    def _check(self) -> None:
        """Make sure that no value is out of all bounds.

        Raises:
            BundleError: naming the first that is.
        """
        bounds = {
            "image_size": (1, 4096),
            "tile_bits": (1, 32),
            "ct_depth": (1, 4096),
            "slice_size": (1, 4096),
            "min_slices": (1, 100_000),
            "blank_std": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise BundleError(
                    f"preprocessing spec: {name} is {value}, expected {low} to {high}: export again"
                )
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise BundleError("preprocessing spec: channels are none or named twice: export again")
        if not self.hu_windows or any(low >= high for low, high in self.hu_windows):
            raise BundleError("preprocessing spec: hu_windows are none or empty: export again")
        if self.tile_mpp is not None and self.tile_mpp <= 0:
            raise BundleError(
                f"preprocessing spec: tile_mpp is {self.tile_mpp}, expected above 0: export again"
            )

    def ct(self, volume: Volume) -> Float:
        """Reduce a volume to the CT input.

        Every output voxel is the mean HU over its exact box of input voxels: plain interpolation
        from 512 to 128 would alias. Windows are applied after the mean.

        Returns:
            `(1, W, D, S, S)` float32, -1 to 1.

        Raises:
            SeriesError: too few slices, or HU that are not finite.
        """
        hu = volume.hu
        shape = hu.shape
        if len(shape) != 3 or 0 in shape or shape[0] < self.min_slices:
            raise SeriesError(
                f"volume of shape {shape}: expected (D, H, W) with {self.min_slices} or more slices"
            )
        if not np.isfinite(hu).all():
            raise SeriesError("volume: some HU are not finite: mask them to -1024 first")
        return self.ct_of_means(area_resize(hu, self.ct_means_shape))

    def ct_of_means(self, small: Float) -> Float:
        """As `ct`, of mean HU `ct_means_shape`: those that `load_reduced` gives."""
        windows = [(small - low) * (2.0 / (high - low)) - 1.0 for low, high in self.hu_windows]
        return np.clip(np.stack(windows)[None], -1.0, 1.0).astype(np.float32)

    def tile(self, pixels: NDArray[Any], bits: int, *, name: str) -> NDArray[Any]:
        """Bring one tile to the size and range of the tile input.

        Args:
            pixels: `(H, W, M)`, channels in the model's order; the centre square is taken.
            bits: significant bits of an integer sample; floats must lie in 0 to 1.
            name: what an error calls the tile.

        Returns:
            `(M, S, S)`, uint8 or float32 as `tile_dtype` says.

        Raises:
            TileError: values outside the range that the sample format allows.
        """
        squared = centre_square(pixels)
        size = self.image_size
        if self.tile_dtype == "uint8" and squared.dtype == np.uint8 and squared.shape[0] == size:
            return np.ascontiguousarray(squared.transpose(2, 0, 1))
        if bits > self.tile_bits and squared.dtype != np.uint8 and self.tile_bits > 8:
            bits = self.tile_bits
        planes = unit_range(squared, bits, name=name).transpose(2, 0, 1)
        planes = area_resize(planes, (planes.shape[0], size, size))
        if self.tile_dtype == "uint8":
            bytes_: NDArray[np.uint8] = np.rint(np.clip(planes, 0, 1) * 255).astype(np.uint8)
            return bytes_
        fractions: Float = np.clip(planes, 0.0, 1.0)
        return fractions

    def crop_warning(self, tile: Tile) -> str | None:
        """Say when a good part of an oblong tile is left out."""
        short, long = sorted(tile.pixels.shape[:2])
        if long <= 1.1 * short:
            return None
        return f"oblong tile: only the centre square counts, {short / long:.0%} of its area"

    def is_blank(self, tile_input: NDArray[Any]) -> bool:
        """Tell whether a tile input `(M, S, S)` shows no tissue: every channel is almost flat."""
        full_scale = 255.0 if tile_input.dtype == np.uint8 else 1.0
        spread = tile_input.std(axis=(1, 2), dtype=np.float64) / full_scale
        return bool(spread.max() < self.blank_std)

    def scale_warning(self, tile: Tile) -> str | None:
        """Say when a tile shows the tissue at another magnification than training did."""
        if tile.mpp is None or self.tile_mpp is None:
            return None
        found = tile.mpp * min(tile.pixels.shape[:2]) / self.image_size
        if 2 / 3 <= found / self.tile_mpp <= 1.5:
            return None
        return (
            f"scale {found:.2f} microns a pixel after resizing, trained at {self.tile_mpp:.2f}: "
            f"crop tiles of {self.image_size * self.tile_mpp:.0f} microns"
        )


def unit_range(pixels: NDArray[Any], bits: int, *, name: str) -> Float:
    """Scale samples to 0 to 1 by their bit depth.

    Raises:
        TileError: negative samples, floats outside 0 to 1, samples above the stated bits.
    """
    low, high = float(pixels.min()), float(pixels.max())
    top = 1.0 if np.issubdtype(pixels.dtype, np.floating) else float(2**bits - 1)
    if not (low >= 0 and high <= top):  # NaN compares false
        raise TileError(
            f"{name}: samples run from {low:g} to {high:g}, expected 0 to {top:g} for "
            f"{pixels.dtype}: rescale the tile before it comes here"
        )
    return (pixels.astype(np.float32) / np.float32(top)).astype(np.float32, copy=False)


def area_resize(array: NDArray[Any], shape: tuple[int, ...]) -> Float:
    """Resize every axis: box means where it shrinks, linear interpolation where it grows.

    Args:
        array: any real dtype.
        shape: the new length of each axis.

    Returns:
        float32 of that shape.
    """
    result = np.asarray(array, dtype=np.float32)
    # The last axes first: there the reduction is largest and memory contiguous.
    for axis in reversed(range(result.ndim)):
        if result.shape[axis] != shape[axis]:
            weights = resize_matrix(result.shape[axis], shape[axis])
            result = np.moveaxis(np.moveaxis(result, axis, -1) @ weights.T, -1, axis)
    return np.ascontiguousarray(result, dtype=np.float32)


@lru_cache(maxsize=32)
def resize_matrix(n_in: int, n_out: int) -> Float:
    """Weights that resize one axis; each row sums to 1.

    Returns:
        `(n_out, n_in)` float32: exact box means for `n_out < n_in`, else linear interpolation
        between sample centres with the border held.
    """
    if n_out < n_in:
        edges = np.arange(n_out + 1) * (n_in / n_out)
        cells = np.arange(n_in)
        right = np.minimum(edges[1:, None], cells[None] + 1)
        left = np.maximum(edges[:-1, None], cells[None])
        weights = np.clip(right - left, 0, None) * (n_out / n_in)
    else:
        centres = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
        weights = np.clip(1 - np.abs(centres[:, None] - np.arange(n_in)[None]), 0, None)
    result: Float = weights.astype(np.float32)
    result.setflags(write=False)
    return result


def centre_square(pixels: NDArray[Any]) -> NDArray[Any]:
    """Cut the square in the middle out of `(H, W, ...)`."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]
