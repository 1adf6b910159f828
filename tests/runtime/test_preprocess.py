from __future__ import annotations

import numpy as np
import pytest

from cdt_runtime.ct import Volume
from cdt_runtime.errors import BundleError, TileError
from cdt_runtime.preprocess import Preprocess, area_resize, resize_matrix, unit_range
from cdt_runtime.tile import Tile

SPEC = Preprocess(channels=("DAPI", "PanCK"), image_size=64, ct_depth=8, slice_size=32)
EYE = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def volume(hu: np.ndarray) -> Volume:
    return Volume(hu.astype(np.float32), (2.5, 0.7, 0.7), (0.0, 0.0, 0.0), EYE, "0" * 64)


def exact_area_mean(line: np.ndarray, n_out: int) -> np.ndarray:
    """Box means by integration of the step function, in float64."""
    total = np.concatenate([[0.0], np.cumsum(line, dtype=np.float64)])
    edges = np.linspace(0, len(line), n_out + 1)
    return np.diff(np.interp(edges, np.arange(len(line) + 1), total)) / (len(line) / n_out)


@pytest.mark.parametrize(("n_in", "n_out"), [(512, 128), (64, 16), (133, 16), (500, 224), (7, 3)])
def test_shrinking_takes_exact_box_means(n_in: int, n_out: int) -> None:
    line = np.random.default_rng(0).uniform(-1000, 3000, n_in)
    assert np.abs(area_resize(line, (n_out,)) - exact_area_mean(line, n_out)).max() < 0.01


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile([1000.0, -1000.0], 256)
    assert np.abs(area_resize(stripes, (128,))).max() < 1e-3
    assert np.abs(stripes[::4]).max() == 1000  # what taking every fourth sample would give


def test_growing_interpolates_between_centres() -> None:
    assert area_resize(np.array([0.0, 1.0]), (4,)).tolist() == [0.0, 0.25, 0.75, 1.0]


@pytest.mark.parametrize(("n_in", "n_out"), [(10, 3), (3, 10), (5, 5), (1, 4)])
def test_every_row_of_a_resize_matrix_sums_to_one(n_in: int, n_out: int) -> None:
    assert np.allclose(resize_matrix(n_in, n_out).sum(axis=1), 1)


def test_ct_input_is_the_windowed_mean() -> None:
    hu = np.full((16, 64, 64), -1000.0)
    hu[:, :, 32:] = 5000.0  # metal, beyond the window
    array = SPEC.ct(volume(hu))
    assert array.shape == SPEC.ct_shape == (1, 1, 8, 32, 32)
    assert array.dtype == np.float32
    assert array[0, 0, 0, 0, 0] == -1
    assert array[0, 0, 0, 0, -1] == 1


def test_each_hu_window_is_a_channel() -> None:
    spec = Preprocess(channels=("R",), ct_depth=8, slice_size=32, hu_windows=((0, 100), (-50, 50)))
    array = spec.ct(volume(np.full((8, 32, 32), 50.0)))
    assert array.shape[1] == 2
    assert np.allclose(array[0, :, 0, 0, 0], [0.0, 1.0])


def test_a_tile_of_the_right_size_keeps_its_bytes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 2), dtype=np.uint8)
    assert np.array_equal(SPEC.tile(pixels, 8, name="t"), pixels.transpose(2, 0, 1))


def test_sixteen_bit_tiles_are_scaled_by_their_bits() -> None:
    pixels = np.full((64, 64, 2), 4095, dtype=np.uint16)
    assert SPEC.tile(pixels, 12, name="t").max() == 255
    assert SPEC.tile(pixels, 16, name="t").max() == 16


def test_twelve_bits_in_sixteen_are_scaled_by_what_training_saw() -> None:
    spec = Preprocess(channels=("DAPI", "PanCK"), image_size=64, tile_dtype="float32", tile_bits=12)
    pixels = np.random.default_rng(0).normal(900, 400, (64, 64, 2)).clip(0, 4095)
    array = spec.tile(pixels.astype(np.uint16), 16, name="t")
    assert array.max() > 0.4
    assert not spec.is_blank(array)
    with pytest.raises(TileError, match="expected 0 to 4095 for uint16"):
        spec.tile(np.full((64, 64, 2), 9000, np.uint16), 16, name="t")


def test_float_models_get_fractions() -> None:
    spec = Preprocess(channels=("DAPI", "PanCK"), image_size=64, tile_dtype="float32")
    array = spec.tile(np.full((64, 64, 2), 51, dtype=np.uint8), 8, name="t")
    assert array.dtype == np.float32
    assert np.allclose(array, 0.2)


def test_the_centre_square_of_an_oblong_tile_is_taken() -> None:
    pixels = np.zeros((64, 128, 2), dtype=np.uint8)
    pixels[:, 32:96] = 200
    assert SPEC.tile(pixels, 8, name="t").min() == 200


def test_samples_above_their_bits_are_refused() -> None:
    pixels = np.full((8, 8, 1), 5000, dtype=np.uint16)
    with pytest.raises(TileError, match=r"t\.tif: samples run from 5000 to 5000, expected 0 to 40"):
        unit_range(pixels, 12, name="t.tif")


def test_floats_outside_the_unit_range_are_refused() -> None:
    with pytest.raises(TileError, match="samples run from -2 to 3, expected 0 to 1 for float32"):
        unit_range(np.array([[[-2.0], [3.0]]], dtype=np.float32), 32, name="t.tif")


def test_blank_tiles_are_told_from_tissue() -> None:
    rng = np.random.default_rng(0)
    flat = np.clip(rng.normal(240, 3, (2, 64, 64)), 0, 255).astype(np.uint8)
    assert SPEC.is_blank(flat)
    flat[1] = rng.integers(0, 256, (64, 64))
    assert not SPEC.is_blank(flat)


def tile(mpp: float | None) -> Tile:
    return Tile(np.zeros((128, 128, 2), np.uint8), ("DAPI", "PanCK"), 8, mpp, "0" * 64, "t")


def test_another_magnification_is_warned_about() -> None:
    spec = Preprocess(channels=("DAPI", "PanCK"), image_size=64, tile_mpp=1.0)
    assert spec.scale_warning(tile(0.5)) is None
    assert spec.scale_warning(tile(None)) is None
    warning = spec.scale_warning(tile(2.0))
    assert warning is not None
    assert "scale 4.00 microns a pixel after resizing, trained at 1.00: crop tiles of 64" in warning


def test_a_spec_survives_json_and_has_an_identity() -> None:
    assert Preprocess.from_dict(SPEC.to_dict()) == SPEC
    assert SPEC.sha256 != Preprocess(channels=("PanCK", "DAPI"), image_size=64).sha256


def test_a_spec_of_another_version_is_refused() -> None:
    values = SPEC.to_dict()
    values["gamma"] = values.pop("image_size")
    with pytest.raises(BundleError, match="keys missing or unknown: gamma, image_size"):
        Preprocess.from_dict(values)
