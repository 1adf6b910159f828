"""CT series made here: the same HU whatever the encoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs as codecs
import numpy as np
import pytest
from both_ways import read_series
from dicom_maker import (
    TRUTH,
    enhanced,
    every,
    rle,
    save,
    set_compressed,
    set_pixels,
    values,
    without,
    write_series,
)
from pydicom import uid as uids


@pytest.mark.parametrize(
    "syntax",
    [
        uids.ImplicitVRLittleEndian,
        uids.ExplicitVRLittleEndian,
        uids.ExplicitVRBigEndian,
        uids.DeflatedExplicitVRLittleEndian,
    ],
)
def test_uncompressed_syntaxes(syntax: str, tmp_path: Path) -> None:
    write_series(tmp_path, syntax=syntax)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.hu.dtype == np.float32
    assert volume.spacing_mm == (2.5, 0.75, 0.5)
    assert volume.origin_mm == (-10, -20, 100)
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    assert volume.description == "8 slices of 8 x 6, 0.50 x 0.75 x 2.50 mm"
    assert volume.warnings == ()


LOSSLESS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "RLE": (uids.RLELossless, rle),
    "JPEG-LS": (uids.JPEGLSLossless, lambda a: codecs.jpegls_encode(a)),
    "JPEG 2000": (
        uids.JPEG2000Lossless,
        lambda a: codecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="j2k"),
    ),
    "JPEG lossless": (
        uids.JPEGLosslessSV1,
        lambda a: codecs.jpeg8_encode(a, lossless=True, predictor=1, bitspersample=16),
    ),
}


@pytest.mark.parametrize("codec", LOSSLESS)
def test_compressed_syntaxes(codec: str, tmp_path: Path) -> None:
    syntax, encode = LOSSLESS[codec]

    def change(ds: Any, index: int) -> None:
        ds.PixelRepresentation, ds.RescaleIntercept = 0, -1024
        set_compressed(ds, syntax, encode((values(index) + 1024).astype(np.uint16)))

    write_series(tmp_path, change=change)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == ()


def test_signed_values_in_an_unsigned_jpeg_2000_stream(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.BitsStored, ds.HighBit = 13, 12
        bits = values(index).astype(np.uint16) & 0x1FFF
        stream = codecs.jpeg2k_encode(
            bits, level=0, reversible=True, codecformat="j2k", bitspersample=13
        )
        set_compressed(ds, uids.JPEG2000Lossless, stream)

    write_series(tmp_path, change=change)
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


@pytest.mark.parametrize("bits", [8, 12])
def test_lossy_jpeg_is_close_and_reported(bits: int, tmp_path: Path) -> None:
    slope = 16 if bits == 8 else 1
    syntax = uids.JPEGBaseline8Bit if bits == 8 else uids.JPEGExtended12Bit

    def change(ds: Any, index: int) -> None:
        ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 0, slope, -1024
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8 if bits == 8 else 16), bits, bits - 1
        cells = ((values(index) + 1024) // slope).astype(np.uint8 if bits == 8 else np.uint16)
        set_compressed(ds, syntax, codecs.jpeg8_encode(cells, level=100, bitspersample=bits))

    write_series(tmp_path, change=change)
    volume = read_series(tmp_path)
    assert np.abs(volume.hu - TRUTH).max() <= 3 * slope
    assert volume.warnings == ("the pixels were compressed with loss (8 slices)",)


def test_unsigned_12_bits_with_rubbish_above(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 12, 11, 0, -1024
        set_pixels(ds, (values(index) + 1024).astype(np.uint16) | 0xA000)

    write_series(tmp_path, change=change)
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_signed_12_bits_are_sign_extended(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 11
        set_pixels(ds, values(index).astype(np.uint16) & 0x0FFF)

    write_series(tmp_path, change=change)
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_stored_bits_that_begin_higher_up(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 13
        set_pixels(ds, (values(index).astype(np.uint16) & 0x0FFF) << 2 | 1)

    write_series(tmp_path, change=change)
    np.testing.assert_array_equal(read_series(tmp_path).hu, TRUTH)


def test_slope_and_intercept_of_each_slice(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = index + 1, -100 * index
        ds.RescaleType = "Houndsfield Unit"  # as a scanner really writes it

    write_series(tmp_path, change=change)
    scale = np.arange(8).reshape(8, 1, 1)
    expected = np.stack([values(i) for i in range(8)]) * (scale + 1.0) - 100 * scale
    np.testing.assert_array_equal(read_series(tmp_path).hu, np.maximum(expected, -1024))


def test_missing_rescale_is_reported(tmp_path: Path) -> None:
    write_series(tmp_path, change=without("RescaleSlope", "RescaleIntercept"))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == (
        "RescaleSlope or RescaleIntercept is missing: 1 and 0 were taken (8 slices)",
    )


@pytest.mark.parametrize(
    ("padding", "vr", "limit", "fill"),
    [
        (-2000, "SS", None, -2000),
        (63536, "US", None, -2000),
        (-3024, "SS", None, -3024),
        (3071, "SS", None, 3071),
        (3000, "SS", 4000, 3500),
    ],
)
@pytest.mark.parametrize("syntax", [uids.ExplicitVRLittleEndian, uids.ImplicitVRLittleEndian])
def test_padding_becomes_air(
    padding: int, vr: str, limit: int | None, fill: int, syntax: str, tmp_path: Path
) -> None:
    def change(ds: Any, index: int) -> None:
        ds.add_new("PixelPaddingValue", vr, padding)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", vr, limit)
        cells = values(index)
        cells[0] = fill
        set_pixels(ds, cells)

    write_series(tmp_path, change=change, syntax=syntax)
    hu = read_series(tmp_path).hu
    assert (hu[:, 0] == -1024).all()
    np.testing.assert_array_equal(hu[:, 1:], TRUTH[:, 1:])


def test_padding_that_does_not_fit_the_stored_bits(tmp_path: Path) -> None:
    def change(ds: Any, index: int) -> None:
        ds.BitsStored, ds.HighBit, ds.PixelPaddingValue = 12, 11, -3024
        cells = values(index)
        cells[0] = -3024  # its lower 12 bits read 1072 HU
        set_pixels(ds, cells)

    write_series(tmp_path, change=change)
    assert (read_series(tmp_path).hu[:, 0] == -1024).all()


def test_padding_inside_tissue_is_not_masked(tmp_path: Path) -> None:
    write_series(tmp_path, change=every(PixelPaddingValue=0))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH)
    assert volume.warnings == (
        "PixelPaddingValue lies inside the range of tissue: not masked (8 slices)",
    )


def test_enhanced_file(tmp_path: Path) -> None:
    save(enhanced(), tmp_path / "volume")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, TRUTH - (TRUTH - np.arange(8)[:, None, None]) % 2)
    assert volume.origin_mm == (-10, -20, 100)
    assert volume.spacing_mm == (2.5, 0.75, 0.5)
