"""Every kind of tile file, generated: what is read, and the line that is said where it is not."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiff_builder import BYTE, build, gray
from tile_cases import (
    GLASS,
    GRAY8,
    GRAY16,
    MARKERS,
    NAMES,
    OME,
    PALETTE,
    READ,
    REFUSED,
    RGB8,
    SCALES,
    ome_text,
    photo,
    resolution,
    rgb,
    with_text,
    written,
)

from cdt_runtime import tile_limits
from cdt_runtime.errors import TileError
from cdt_runtime.tile import Tile, read_tile

NO_MPP = "no resolution in the file: give it with --mpp"


def read(tmp_path: Path, data: bytes, name: str = "tile.tif", **options: object) -> Tile:
    path = tmp_path / name
    path.write_bytes(data)
    return read_tile(path, **options)


@pytest.mark.parametrize(("data", "pixels", "channels", "bits"), [row[1:] for row in READ],
                         ids=[row[0] for row in READ])  # fmt: skip
def test_what_is_read(
    tmp_path: Path, data: bytes, pixels: np.ndarray, channels: tuple[str, ...], bits: int
) -> None:
    tile = read(tmp_path, data)
    np.testing.assert_array_equal(tile.pixels, pixels, strict=True)
    assert (tile.channels, tile.bits, tile.source) == (channels, bits, "tile.tif")
    assert tile.pixels.flags.c_contiguous


@pytest.mark.parametrize(
    ("data", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(TileError, match=says) as caught:
        read(tmp_path, data)
    text = str(caught.value)
    assert text.startswith("tile.tif: ")
    assert "\n" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    tag = (274, 3, 1, orientation, True)
    tile = read(tmp_path, rgb(extratags=[tag]))
    photo_exif = Image.Exif()
    photo_exif[0x0112] = orientation
    again = read(tmp_path, photo(RGB8, "PNG", exif=photo_exif), "tile.png")
    from PIL import ImageOps

    upright = Image.open(io.BytesIO(photo(RGB8, "PNG", exif=photo_exif)))
    expected = np.asarray(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(tile.pixels, expected)
    np.testing.assert_array_equal(again.pixels, expected)


@pytest.mark.parametrize(
    ("data", "mpp"), [row[1:] for row in SCALES], ids=[row[0] for row in SCALES]
)
def test_microns_a_pixel(tmp_path: Path, data: bytes, mpp: float | None) -> None:
    tile = read(tmp_path, data)
    assert tile.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-4))
    assert (NO_MPP in tile.warnings) == (mpp is None)


def test_mpp_is_given_or_refused(tmp_path: Path) -> None:
    tile = read(tmp_path, resolution(20_000, 20_000, 3), mpp=0.25)
    assert tile.mpp == 0.25
    with pytest.raises(TileError, match=r"--mpp is nan, expected 0.01 to 100"):
        read(tmp_path, rgb(), mpp=float("nan"))


def test_unequal_pixel_sides_are_said(tmp_path: Path) -> None:
    tile = read(tmp_path, resolution(20_000, 10_000, 3))
    assert tile.mpp is None
    assert tile.warnings[0] == "pixels of 0.5 x 1 microns are not square: give --mpp"


class TestNames:
    def test_given_names_go_on_a_file_without(self, tmp_path: Path) -> None:
        tile = read(tmp_path, written(MARKERS, photometric="minisblack"), channels=NAMES)
        assert tile.channels == NAMES

    def test_given_names_go_on_the_samples_of_one_page(self, tmp_path: Path) -> None:
        data = written(MARKERS, photometric="minisblack", planarconfig="separate", metadata=None)
        tile = read(tmp_path, data, channels=NAMES)
        np.testing.assert_array_equal(tile.pixels, MARKERS.transpose(1, 2, 0))

    def test_given_names_make_a_fourth_sample_a_marker(self, tmp_path: Path) -> None:
        names = (*NAMES, "CD8")
        tile = read(tmp_path, written(GLASS, photometric="rgb", extrasamples=[2]), channels=names)
        np.testing.assert_array_equal(tile.pixels, GLASS)
        assert tile.channels == names

    def test_their_count_must_match(self, tmp_path: Path) -> None:
        with pytest.raises(TileError, match="has 3 channels but --channels names 2"):
            read(tmp_path, written(MARKERS, photometric="minisblack"), channels=NAMES[:2])

    def test_they_must_agree_with_the_file(self, tmp_path: Path) -> None:
        data = written(MARKERS, ome=True, metadata=OME)
        assert read(tmp_path, data, channels=("Hoechst", "cd3", "CK")).channels[0] == "Hoechst"
        with pytest.raises(
            TileError, match="names its channels DAPI, CD3, PanCK but --channels says"
        ):
            read(tmp_path, data, channels=("CD3", "DAPI", "PanCK"))

    def test_a_dye_is_given_its_marker(self, tmp_path: Path) -> None:
        dyes = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
        tile = read(tmp_path, written(MARKERS, ome=True, metadata=dyes), channels=NAMES)
        assert tile.channels == NAMES
        assert "channel 'FITC' is taken as 'CD3' (--channels)" in tile.warnings

    def test_colours_mixed_by_a_codec_are_not_markers(self, tmp_path: Path) -> None:
        with pytest.raises(TileError, match="names its channels R, G, B but --channels says DAPI"):
            read(tmp_path, photo(RGB8, "JPEG"), channels=NAMES)

    def test_perkin_elmer_pages_carry_names(self, tmp_path: Path) -> None:
        root = "PerkinElmer-QPI-ImageDescription"
        text = f"<{root}><ImageType>{{}}</ImageType><Name>{{}}</Name></{root}>"
        with tifffile.TiffWriter(tmp_path / "tile.tif") as writer:
            for name, plane in zip(("DAPI", "CD3 (Opal 570)", "CK"), MARKERS, strict=True):
                writer.write(plane, description=text.format("FullResolution", name), metadata=None)
            writer.write(GRAY8, description=text.format("Thumbnail", ""), metadata=None)
        tile = read_tile(tmp_path / "tile.tif")
        assert tile.channels == ("DAPI", "CD3 (Opal 570)", "CK")

    def test_ome_planes_are_taken_in_the_order_of_the_xml(self, tmp_path: Path) -> None:
        order = (2, 0, 1)
        blocks = "".join(f'<TiffData IFD="{page}" FirstC="{at}"/>' for at, page in enumerate(order))
        named = "".join(f'<Channel Name="{name}"/>' for name in NAMES)
        tile = read(tmp_path, with_text(ome_text(inside=named + blocks)))
        np.testing.assert_array_equal(tile.pixels, MARKERS[list(order)].transpose(1, 2, 0))

    def test_a_pyramid_gives_its_full_size(self, tmp_path: Path) -> None:
        with tifffile.TiffWriter(tmp_path / "tile.tif") as writer:
            writer.write(RGB8, photometric="rgb")
            writer.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1)
        np.testing.assert_array_equal(read_tile(tmp_path / "tile.tif").pixels, RGB8)


class TestMarkerFolder:
    def fill(self, folder: Path, **images: np.ndarray) -> Path:
        folder.mkdir(exist_ok=True)
        for stem, array in images.items():
            (folder / f"{stem}.png").write_bytes(photo(array, "PNG"))
        return folder

    def test_one_image_a_marker(self, tmp_path: Path) -> None:
        images = {
            "region_001_DAPI": GRAY8,
            "region_001_CD3": 255 - GRAY8,
            "region_001_GZMB": GRAY8 // 2,
        }
        folder = self.fill(tmp_path / "region_001", **images)
        (folder / "Thumbs.db").write_bytes(b"x")
        tile = read_tile(folder)
        assert tile.channels == ("CD3", "DAPI", "GZMB")  # by file name
        assert tile.source == "region_001"
        np.testing.assert_array_equal(tile.pixels[:, :, 0], 255 - GRAY8)

    def test_the_hash_is_of_all_files(self, tmp_path: Path) -> None:
        first = read_tile(self.fill(tmp_path / "a", DAPI=GRAY8, CD3=GRAY8)).sha256
        assert read_tile(self.fill(tmp_path / "b", DAPI=GRAY8, CD3=GRAY8)).sha256 == first
        assert read_tile(self.fill(tmp_path / "b", DAPI=GRAY8, CD3=GRAY8 // 2)).sha256 != first

    def test_one_multi_channel_image(self, tmp_path: Path) -> None:
        (tmp_path / "stack.tif").write_bytes(written(MARKERS, ome=True, metadata=OME))
        assert read_tile(tmp_path).channels == NAMES

    @pytest.mark.parametrize(
        ("images", "says"),
        [
            ({}, "without TIFF, PNG or JPEG images"),
            ({"DAPI": GRAY8, "a_dapi": GRAY8}, "two images for one marker: 'DAPI', 'a_dapi'"),
            ({"DAPI": GRAY8, "CD3": GRAY8[:10]}, "DAPI.png is 30 x 20 uint8 of 8 bits but CD3.png"),
            ({"DAPI": GRAY8, "CD3": GRAY16}, "but CD3.png is 30 x 20 uint16 of 16 bits"),
            ({"DAPI": GRAY8, "CD3": RGB8}, "CD3.png has 3 channels among marker images"),
        ],
    )  # fmt: skip
    def test_what_is_refused(
        self, tmp_path: Path, images: dict[str, np.ndarray], says: str
    ) -> None:
        folder = self.fill(tmp_path / "region", **images)
        with pytest.raises(TileError) as caught:
            read_tile(folder)
        assert str(caught.value).startswith("region: ")
        assert says in str(caught.value)

    def test_a_patient_folder_names_its_regions(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "region_001", DAPI=GRAY8)
        with pytest.raises(TileError, match="it has the folders region_001: name one region"):
            read_tile(tmp_path)

    def test_a_damaged_member_is_named(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "r", DAPI=GRAY8)
        (tmp_path / "r" / "CD3.tif").write_bytes(b"II*\0")
        with pytest.raises(TileError, match=r"^r: CD3.tif: the TIFF header"):
            read_tile(tmp_path / "r")


def test_missing_and_irregular_paths(tmp_path: Path) -> None:
    with pytest.raises(TileError, match=r"^none.tif: no such file or folder"):
        read_tile(tmp_path / "none.tif")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TileError, match=r"^pipe: is not a regular file"):
        read_tile(tmp_path / "pipe")


def test_the_hash_is_of_the_file(tmp_path: Path) -> None:
    import hashlib

    data = rgb()
    assert read(tmp_path, data).sha256 == hashlib.sha256(data).hexdigest()


def test_the_limits_are_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_limits, "MAX_PIXELS", 599)
    for data in (rgb(), photo(RGB8, "PNG"), photo(RGB8, "JPEG")):
        with pytest.raises(TileError, match="is 30 x 20 pixels, over the limit"):
            read(tmp_path, data)


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.tif", tmp_path / "bad.tif"
    good.write_bytes(rgb(compression="zlib"))
    bad.write_bytes(rgb(compression="zlib")[:-50])
    seen: list[str] = []

    def work(path: Path) -> None:
        for _ in range(20):
            try:
                read_tile(path)
                seen.append("good")
            except TileError:
                seen.append("bad")

    threads = [threading.Thread(target=work, args=(path,)) for path in (good, bad) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen.count("good"), seen.count("bad")) == (40, 40)


def test_import_needs_only_numpy() -> None:
    heavy = "{'tifffile', 'imagecodecs', 'PIL', 'xml.etree.ElementTree'}"
    code = f"import sys, cdt_runtime.tile; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SEEDS = [
    written(MARKERS, ome=True, metadata=OME),
    rgb(compression="lzw", tile=(16, 16)),
    rgb(bigtiff=True, compression="zlib"),
    PALETTE,
    photo(RGB8, "PNG"),
    photo(RGB8, "JPEG"),
]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_damage_ends_in_an_error_or_a_whole_tile(
    tmp_path: Path, seed: bytes, data: st.DataObject
) -> None:
    broken = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(len(broken) // 2, len(broken)))
    try:
        tile = read(tmp_path, bytes(broken[:cut]))
    except TileError:
        return
    assert tile.pixels.size > 0
    assert tile.pixels.shape[2] == len(tile.channels)


def test_a_byte_typed_count_is_read(tmp_path: Path) -> None:
    tile = read(tmp_path, build(gray(1, 1, b"\x07", t277=(BYTE, [1])), order=">"))
    assert tile.pixels.tolist() == [[[7]]]


def z_stack(axes: str) -> tuple[bytes, np.ndarray]:
    """An OME-TIFF of 3 channels and 4 planes, and its samples `(C, Z, H, W)`."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 4096, (3, 4, 20, 30), dtype=np.uint16)
    stored = pixels if axes == "CZYX" else pixels.swapaxes(0, 1)
    names = {"Name": ["DAPI", "CD3", "CD8"]}
    return written(stored, ome=True, metadata={"axes": axes, "Channel": names}), pixels


@pytest.mark.parametrize("axes", ["CZYX", "ZCYX"])
def test_a_plane_of_a_stack_or_the_maximum_of_all(tmp_path: Path, axes: str) -> None:
    data, pixels = z_stack(axes)
    (tmp_path / "stack.ome.tif").write_bytes(data)
    for z in (1, 3, 4):
        tile = read_tile(tmp_path / "stack.ome.tif", z=z)
        assert np.array_equal(tile.pixels, pixels[:, z - 1].transpose(1, 2, 0))
        assert (tile.channels, tile.warnings[0]) == (NAMES_3, f"plane {z} of 4 in Z")
    tile = read_tile(tmp_path / "stack.ome.tif", z="max")
    assert np.array_equal(tile.pixels, pixels.max(axis=1).transpose(1, 2, 0))
    assert tile.warnings[0] == "the maximum of 4 planes in Z"
    with pytest.raises(TileError, match="--z 5: it has 4 planes in Z, counted from 1: give one"):
        read_tile(tmp_path / "stack.ome.tif", z=5)
    with pytest.raises(TileError, match=r"stack of planes \(Z = 4\), .*: --z takes one of an OME"):
        read_tile(tmp_path / "stack.ome.tif")


NAMES_3 = ("DAPI", "CD3", "CD8")


def test_a_gray_stack(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 255, (4, 20, 30), dtype=np.uint8)
    (tmp_path / "s.ome.tif").write_bytes(written(pixels, ome=True, metadata={"axes": "ZYX"}))
    tile = read_tile(tmp_path / "s.ome.tif", z=2)
    assert tile.channels == ("gray",)
    assert np.array_equal(tile.pixels[..., 0], pixels[1])


@pytest.mark.parametrize("data", [rgb(), photo(RGB8, "PNG"), written(GRAY8, ome=True)])
def test_a_plane_of_what_is_no_stack(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.tif").write_bytes(data)
    assert read_tile(tmp_path / "t.tif", z=1).pixels.size
    assert read_tile(tmp_path / "t.tif", z="max").pixels.size
    with pytest.raises(TileError, match="--z 2: it "):
        read_tile(tmp_path / "t.tif", z=2)


def test_a_stack_in_time_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    stack = written(MARKERS, ome=True, metadata={"axes": "TYX"})
    (tmp_path / "t.ome.tif").write_bytes(stack)
    with pytest.raises(TileError, match=r"stack of planes \(T = 3\)"):
        read_tile(tmp_path / "t.ome.tif", z="max")
