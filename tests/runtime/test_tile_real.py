"""Real tiles: real writers, real damage. Pixels are compared with two other readers."""

from __future__ import annotations

import io
import logging
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cdt_runtime.errors import TileError
from cdt_runtime.tile import RGB, Tile, match_channels, read_tile

ODD_READ = [
    "12in16bit.tif",
    "16bit.MM.cropped.tif",
    "16bit.MM.deflate.tif",
    "16bit.cropped.tif",
    "16bit.deflate.tif",
    "16bit.r.tif",
    "16bit.s.tif",
    "10ct_32bit_128.tiff",
    "child_ifd.tiff",
    "hopper_bigtiff.tif",
    "hopper_jpg.tif",
    "hopper_lzma.tif",
    "hopper_lzw.tif",
    "hopper_webp.tif",
    "tiff_16bit_RGB.tiff",
    "tiff_strip_planar_16bit_RGB.tiff",
    "tiff_strip_planar_lzw.tiff",
    "tiff_strip_ycbcr_jpeg_2x2_sampling.tif",
    "tiff_tiled_planar_16bit_RGB.tiff",
    "tiff_tiled_planar_lzw.tiff",
    "tiff_tiled_ycbcr_jpeg_1x1_sampling.tif",
    "tiff_tiled_ycbcr_jpeg_2x2_sampling.tif",
]

# Pillow cuts 16-bit colours to 8 bits, and its libtiff is built without WebP.
PILLOW_CANT = {
    "hopper_webp.tif",
    "tiff_16bit_RGB.tiff",
    "tiff_strip_planar_16bit_RGB.tiff",
    "tiff_tiled_planar_16bit_RGB.tiff",
}

ODD_REFUSED = {
    "multi-channel-z-series.ome.tif": r"stack of planes \(Z = 5\)",
    "multipage.tiff": "3 unlike pages",
    "separate_planar_extra_samples.tiff": "8-bit signed samples",
    "tiff_16bit_RGBa.tiff": "not an opaque alpha",
    "tiff_strip_planar_16bit_RGBa.tiff": "not an opaque alpha",
    "tiff_tiled_planar_16bit_RGBa.tiff": "not an opaque alpha",
    "tiff_tiled_cmyk_jpeg.tif": "is CMYK",
}


def by_tifffile(path: Path) -> np.ndarray:
    """`(H, W, C)` of the first page."""
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        page = tiff.pages.first
        pixels = page.asarray()
        return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else np.atleast_3d(pixels)


@pytest.mark.parametrize("name", ODD_READ)
def test_odd_files_decode_as_tifffile_does(real_data: Path, name: str) -> None:
    path = real_data / "tiff_odd" / name
    np.testing.assert_array_equal(read_tile(path).pixels, by_tifffile(path), strict=True)


@pytest.mark.parametrize("name", [name for name in ODD_READ if name not in PILLOW_CANT])
def test_odd_files_decode_as_pillow_does(real_data: Path, name: str) -> None:
    path = real_data / "tiff_odd" / name
    tile = read_tile(path)
    with Image.open(path) as image:
        expected = np.atleast_3d(np.asarray(image)).astype(np.int64)
    worst = int(np.abs(tile.pixels.astype(np.int64) - expected).max())
    assert worst <= (6 if "jpeg" in name or "jpg" in name else 0)  # two inverse transforms


@pytest.mark.parametrize(("name", "says"), ODD_REFUSED.items())
def test_odd_files_are_refused(real_data: Path, name: str, says: str) -> None:
    with pytest.raises(TileError, match=says):
        read_tile(real_data / "tiff_odd" / name)


def test_every_odd_file_is_in_one_list(real_data: Path) -> None:
    # a 1 x 1 page with a JPEG in a sub-directory: read, but Pillow follows the sub-directory
    names = {path.name for path in (real_data / "tiff_odd").glob("*.tif*")}
    assert names - {"child_ifd_jpeg.tiff"} == {*ODD_READ, *ODD_REFUSED}


def test_malformed_files_end_in_an_error_or_a_whole_tile(
    real_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read, refused = [], []
    for path in sorted((real_data / "tiff_malformed").glob("*.tif*")):
        start = time.perf_counter()
        try:
            tile = read_tile(path)
            assert tile.pixels.size
            read.append(path.name)
        except TileError as error:
            refused.append(str(error).startswith(f"{path.name}: "))
        assert time.perf_counter() - start < 5, path.name
    assert read == ["hopper_unknown_pixel_mode.tif"]
    assert len(refused) >= 20
    assert all(refused)  # every line begins with the name of its file
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_multiplexed_images_carry_their_markers(real_data: Path) -> None:
    path = real_data / "mif" / "ABCM22001_B09_MiniCrop.ome.tif"
    tile = read_tile(path)
    assert tile.pixels.shape == (500, 500, 7)
    assert tile.channels == ("DAPI", "PDL1", "GZMB", "PD1", "CK-EPCAM", "CD8a", "FOXP3")
    np.testing.assert_array_equal(tile.pixels.transpose(2, 0, 1), tifffile.imread(path))


def test_multiplexed_images_match_the_default_markers_but_cd3(real_data: Path) -> None:
    tile = read_tile(real_data / "mif" / "ABCM22001_B14_MiniCrop.ome.tif")
    expected = ("DAPI", "PanCK", "CD3", "CD8", "FOXP3", "PDL1")
    with pytest.raises(TileError, match="lacks CD3: it has DAPI, PDL1, GZMB, PD1, CK-EPCAM"):
        match_channels(tile, expected)
    matched, mapping, filled = match_channels(tile, expected, fill_missing=True)
    assert filled == ("CD3",)
    assert mapping["PanCK"] == "CK-EPCAM"
    assert mapping["CD8"] == "CD8a"
    np.testing.assert_array_equal(matched[:, :, 1], tile.pixels[:, :, 4])
    assert not matched[:, :, 2].any()


@pytest.mark.parametrize("name", ["cardiac_HE1_TEST.tiff", "cardiac_HE2_TEST.tiff"])
def test_tiled_deflate_with_predictor(real_data: Path, name: str) -> None:
    path = real_data / "mif" / name
    np.testing.assert_array_equal(read_tile(path).pixels, tifffile.imread(path))


def test_the_nine_classes_of_nct_crc(real_data: Path) -> None:
    paths = sorted((real_data / "pathology" / "nct_crc_samples").glob("*.tif"))
    assert len(paths) == 9
    for path in paths:
        tile = read_tile(path)
        with Image.open(path) as image:
            np.testing.assert_array_equal(tile.pixels, np.asarray(image))
        assert (tile.channels, tile.bits, tile.mpp) == (RGB, 8, None)  # 72 dpi says nothing


def test_a_slide_region_with_its_magnification(real_data: Path) -> None:
    path = real_data / "pathology" / "CMU-1-Small-Region.svs"
    tile: Tile = read_tile(path)
    assert tile.pixels.shape == (2967, 2220, 3)
    assert tile.mpp == 0.499
    np.testing.assert_array_equal(tile.pixels, by_tifffile(path))
    assert tile.pixels[:50, :50].mean() > 200  # glass: the colour transform was read rightly


def test_a_jpeg_tile(real_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(real_data / "pathology" / "lc25000_lung_dev.zip") as archive:
        name = next(item for item in archive.namelist() if item.lower().endswith((".jpg", ".jpeg")))
        data = archive.read(name)
    (tmp_path / "a.jpeg").write_bytes(data)
    tile = read_tile(tmp_path / "a.jpeg")
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(tile.pixels, np.asarray(image))
    assert (tile.channels, tile.bits) == (RGB, 8)


def test_truncation_anywhere_is_an_error(real_data: Path, tmp_path: Path) -> None:
    """tifffile returns gray or zeros for some of these."""
    sources = [
        *(real_data / "tiff_odd" / name for name in ODD_READ if not name.startswith("child")),
        real_data / "pathology" / "nct_crc_samples" / "ADI-AAQEFMRI.tif",
    ]
    for source in sources:
        data = source.read_bytes()
        for share in (0.3, 0.7, 0.95):
            cut = tmp_path / source.name
            cut.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(TileError):
                read_tile(cut)


def test_a_real_stack_in_z(real_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "stack.ome.tif"
    path.write_bytes((real_data / "tiff_odd" / "multi-channel-z-series.ome.tif").read_bytes())
    with pytest.raises(TileError, match="8-bit signed samples"):
        read_tile(path, z="max")
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page in file.pages:
            page.tags["SampleFormat"].overwrite(1)  # type: ignore[union-attr]
    pixels = tifffile.imread(path)  # (C, Z, Y, X)
    names = ["a", "b", "c"]
    found = read_tile(path, z="max", channels=names)
    assert np.array_equal(found.pixels, pixels.max(axis=1).transpose(1, 2, 0))
    found = read_tile(path, z=3, channels=names)
    assert np.array_equal(found.pixels, pixels[:, 2].transpose(1, 2, 0))
