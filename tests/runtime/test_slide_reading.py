"""Slides from file to tiles: levels, regions, tissue and the grid."""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slide_maker import smooth_rgb, write_ome, write_svs
from tiff_builder import build, gray

from cdt_runtime.errors import TileError
from cdt_runtime.preprocess import Preprocess, area_resize
from cdt_runtime.reading import level_for, open_slide
from cdt_runtime.slides import regions as regions_module
from cdt_runtime.slides.ahead import ahead
from cdt_runtime.slides.box import Box
from cdt_runtime.slides.cutting import tiles_ahead
from cdt_runtime.slides.grid import STRIP, grid_of, reading_order, tissue_shares
from cdt_runtime.slides.pyramid import Pyramid, open_pyramid
from cdt_runtime.slides.regions import Regions
from cdt_runtime.slides.stream import Reading, tile_batches
from cdt_runtime.slides.tissue import Small, block_means, otsu, small_copy, tissue_mask

MARKERS = ("DAPI", "CD8")


def markers(height: int, width: int, kind: str = "uint8") -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(height * width)
    return rng.integers(0, np.iinfo(kind).max, (height, width, 2), dtype=kind, endpoint=True)


def reread(path: Path, level: int) -> np.ndarray[Any, Any]:
    """A level as tifffile reads it, `(H, W, C)`."""
    found = tifffile.imread(path, series=0, level=level)
    return found if found.shape[-1] == 3 else found.transpose(1, 2, 0)


def test_an_ome_tiff_has_the_levels_channels_and_scale_that_were_written(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "s.ome.tif", markers(300, 501), MARKERS, 0.25)
    with open_pyramid(path) as pyramid:
        sizes = [(level.height, level.width) for level in pyramid.levels]
        assert sizes == [(300, 501), (150, 251), (75, 126)]
        assert [level.downsample for level in pyramid.levels] == pytest.approx([1, 2, 4], rel=0.01)
        assert pyramid.channels == MARKERS
        assert (pyramid.mpp, pyramid.bits, pyramid.warnings) == (0.25, 8, ())


def test_an_svs_has_its_tiled_pages_as_levels_and_no_thumbnail(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", smooth_rgb(640, 512), 0.499)
    with open_pyramid(path) as pyramid:
        assert [level.width for level in pyramid.levels] == [512, 128, 32]
        assert (pyramid.channels, pyramid.mpp) == (("R", "G", "B"), 0.499)


@pytest.mark.parametrize("compression", ["none", "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_region_is_what_another_reader_finds_there(
    tmp_path: Path, compression: str, level: int
) -> None:
    pixels = markers(210, 333, "uint16")
    path = write_ome(tmp_path / "s.ome.tif", pixels, MARKERS, 0.5, compression=compression)
    whole = reread(path, level)
    height, width = whole.shape[:2]
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[level], glass=0) as regions:
        for box in (
            Box(0, 0, height, width),
            Box(7, 3, 41, 30),
            Box(height - 9, width - 70, 9, 70),
        ):
            expected = whole[box.top : box.top + box.height, box.left : box.left + box.width]
            assert np.array_equal(regions.read(box), expected)


def test_a_jpeg_region_is_what_another_reader_finds_there(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", smooth_rgb(300, 260), 0.5)
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[0], glass=255) as regions:
        found = regions.read(Box(33, 20, 150, 200)).astype(int)
    assert np.abs(found - reread(path, 0)[33:183, 20:220].astype(int)).max() <= 1


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Count how often each segment is decoded."""
    seen: Counter[tuple[int, int]] = Counter()
    decode = regions_module.decode_segment

    def counted(page: Any, top: int, left: int, data: bytes) -> Any:
        seen[top, left] += 1
        return decode(page, top, left, data)

    monkeypatch.setattr(regions_module, "decode_segment", counted)
    return seen


def preprocess(**changes: Any) -> Preprocess:
    return replace(Preprocess(("R", "G", "B"), image_size=50, tile_mpp=0.5), **changes)


def plain_reading() -> Reading:
    return Reading((0, 1, 2), 8, 255, "slide")


def test_each_segment_is_decoded_once_and_each_tile_is_that_of_its_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = smooth_rgb(330, 1700)  # more columns of tiles than a strip has
    path = write_svs(tmp_path / "s.svs", pixels, 0.5, levels=1)
    seen = counting(monkeypatch)
    with open_slide(path) as slide:
        grid = grid_of(slide.levels[0], 0.5, 25.0)
        assert (grid.rows, grid.columns) == (6, 34)
        assert grid.columns > 2 * STRIP
        order = reading_order(np.ones((grid.rows, grid.columns), np.float32))
        batches = list(tile_batches(slide, grid, order, preprocess(), plain_reading(), 16))
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[0], glass=255) as regions:
        for box in tiles_ahead(regions, grid.side, order):
            regions.read(box)
    twice = {left for (_, left), count in seen.items() if count > 1}
    assert max(seen.values()) <= 2
    assert twice == {768}  # 16 tiles of 50 pixels end within this column of segments
    assert [len(batch.places) for batch in batches] == [16] * 12 + [12]
    places = [place for batch in batches for place in batch.places]
    assert places == [tuple(place) for place in order.tolist()]
    tiles = np.concatenate([batch.tiles for batch in batches if batch.tiles is not None])
    whole = reread(path, 0)
    for (row, column), tile in zip(places, tiles, strict=True):
        box = grid.box(row, column)
        cut = whole[box.top : box.top + box.height, box.left : box.left + box.width]
        gap = tile.astype(int) - preprocess().tile(cut, 8, name="cut").astype(int)
        assert np.abs(gap).max() <= 1


@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 199), st.integers(0, 149), st.integers(1, 90), st.integers(1, 90)),
        max_size=6,
    )
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_regions_in_any_order_are_right(tmp_path: Path, boxes: list[tuple[int, ...]]) -> None:
    path = tmp_path / "s.ome.tif"
    pixels = markers(200, 150)
    if not path.exists():
        write_ome(path, pixels, MARKERS, 0.5, levels=1, tile=32)
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[0], glass=0) as regions:
        for top, left, height, width in boxes:
            box = Box(top, left, min(height, 200 - top), min(width, 150 - left))
            found = regions.read(box)
            assert np.array_equal(found, pixels[top : top + height, left : left + width])
            regions.forget_above(top)


def test_channels_in_strips_are_a_slide_too(tmp_path: Path) -> None:
    pixels = markers(120, 90)
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(
        path,
        pixels.transpose(2, 0, 1),
        photometric="minisblack",
        metadata={"axes": "CYX", "Channel": {"Name": list(MARKERS)}},
    )
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[0], glass=0) as regions:
        assert pyramid.channels == MARKERS
        assert np.array_equal(regions.read(Box(5, 7, 60, 50)), pixels[5:65, 7:57])


def test_what_the_scanner_left_out_is_glass(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", smooth_rgb(128, 128), 0.5, levels=1)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        counts = file.pages[0].tags[325]  # type: ignore[union-attr]
    struct.pack_into("<I", data, counts.valueoffset + 4, 0)  # the second of four segments
    path.write_bytes(data)
    with open_pyramid(path) as pyramid, Regions(pyramid.levels[0], glass=255) as regions:
        found = regions.read(Box(0, 0, 128, 128))
    assert (found[:64, 64:] == 255).all()
    assert (found[64:] != 255).all()


@pytest.mark.parametrize(
    ("wanted", "level"), [(0.1, 0), (0.25, 0), (0.46, 1), (0.5, 1), (0.99, 2), (8.0, 2)]
)
def test_the_coarsest_level_that_shows_enough_is_read(
    tmp_path: Path, wanted: float, level: int
) -> None:
    path = write_ome(tmp_path / "s.ome.tif", markers(256, 256), MARKERS, 0.25)
    with open_slide(path) as slide:
        assert level_for(slide, wanted, 0.25) is slide.levels[level]


def test_a_slide_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "notes.svs"
    text.write_text("a note")
    with pytest.raises(TileError, match=r"^notes.svs: is no slide in TIFF \(OME-TIFF, SVS, tiled"):
        _opened(text)
    with pytest.raises(TileError, match=r"^gone.svs: no such file$"):
        _opened(tmp_path / "gone.svs")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TileError, match=r"^folder: is a folder without DICOM files \(0 files seen"):
        _opened(tmp_path / "folder")


def test_a_slide_without_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    path.write_bytes(build(gray(0, 4, b"\0")))
    with pytest.raises(TileError, match=r"^s\.tif: is 4 x 0 pixels: there is no image in it"):
        _opened(path)


def test_channels_without_names_need_them(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, markers(64, 64).transpose(2, 0, 1), tile=(32, 32), metadata=None)
    with pytest.raises(TileError, match=r"has 2 channels without names: name them .* --channels"):
        _opened(path)
    with pytest.raises(TileError, match="has 2 channels but --channels names 3: name each once"):
        _opened(path, ["A", "B", "C"])
    assert _opened(path, ["A", "B"]).channels == ("A", "B")


def _opened(path: Path, names: list[str] | None = None) -> Pyramid:
    with open_pyramid(path, names) as pyramid:
        return pyramid


def test_a_slide_smaller_than_a_tile_is_refused(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", smooth_rgb(100, 64), 0.5, levels=1)
    with (
        open_slide(path) as slide,
        pytest.raises(TileError, match="shows 32 x 50 microns, a tile 40: classify it as a tile"),
    ):
        grid_of(slide.levels[0], 0.5, 40.0)


def whole(pixels: np.ndarray[Any, Any]) -> Small:
    return Small(pixels, (1.0, 1.0), np.zeros(pixels.shape[:2], bool))


def tissue_slide() -> np.ndarray[Any, Any]:
    """Glass with one stained rectangle, a pen's stroke and a black border."""
    pixels = np.full((400, 600, 3), 244, np.uint8)
    pixels[100:300, 150:450] = (190, 120, 180)
    pixels[20:30, 20:200] = (12, 12, 14)
    pixels[:, 590:] = 0
    return pixels


def test_tissue_is_told_from_glass_pen_and_border(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", tissue_slide(), 0.5, levels=1)
    small = small_copy(_reopened(path), 255)
    mask = tissue_mask(small, ("R", "G", "B"))
    truth = np.zeros((400, 600), bool)
    truth[100:300, 150:450] = True
    assert (mask == truth).mean() > 0.99
    with open_slide(path) as slide:
        grid = grid_of(slide.levels[0], 0.5, 25.0)
        shares = tissue_shares(grid, mask, small)
    assert shares.shape == (8, 12)
    inner = np.zeros((8, 12), bool)
    inner[2:6, 3:9] = True
    assert (shares[inner] > 0.95).all()
    assert (shares[~inner] < 0.05).all()


def _reopened(path: Path) -> Any:
    """A pyramid whose file stays open until the test is over."""
    manager = open_pyramid(path)
    _OPEN.append(manager)
    return manager.__enter__()


_OPEN: list[Any] = []


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().__exit__(None, None, None)


def test_glass_alone_holds_no_tissue() -> None:
    noise = np.random.default_rng(0).normal(0.96, 0.01, (80, 80, 3)).astype(np.float32)
    assert not tissue_mask(whole(noise), ("R", "G", "B")).any()
    dark = np.zeros((80, 80, 2), np.float32)
    assert not tissue_mask(whole(dark), MARKERS).any()


def test_markers_are_tissue_where_they_shine() -> None:
    pixels = np.random.default_rng(0).uniform(0, 0.01, (80, 80, 2)).astype(np.float32)
    pixels[20:60, 10:70] += 0.3
    mask = tissue_mask(whole(pixels), MARKERS)
    assert mask[22:58, 12:68].all()
    assert mask.sum() <= 40 * 60


def test_the_small_copy_is_the_area_mean_of_a_level(tmp_path: Path) -> None:
    pixels = markers(300, 410)
    path = write_ome(tmp_path / "s.ome.tif", pixels, MARKERS, 0.5, levels=1)
    small = small_copy(_reopened(path), 0, side=82)
    assert small.pixels.shape == (60, 82, 2)
    assert small.scale == (5.0, 5.0)
    assert np.allclose(small.pixels, area_resize(pixels, (60, 82, 2)) / 255, atol=1e-5)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_blocks_at_the_end_average_what_there_is(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (7, 10, 2)).astype(kind)
    found = block_means(pixels, 3)
    assert found.shape == (3, 4, 2)
    for row, column in ((0, 0), (2, 1), (1, 3), (2, 3)):
        block = pixels[row * 3 : row * 3 + 3, column * 3 : column * 3 + 3].astype(float)
        assert np.allclose(found[row, column], block.mean(axis=(0, 1)))


def test_a_damaged_part_is_looked_at_all_the_same(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", np.full((256, 256, 3), 250, np.uint8), 0.5, levels=1)
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].dataoffsets[5]  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    small = small_copy(_reopened(path), 255, side=128)
    expected = np.zeros((128, 128), bool)
    expected[32:64, 32:64] = True
    assert np.array_equal(small.damaged, expected)
    assert np.array_equal(tissue_mask(small, ("R", "G", "B")), expected)


def test_otsu_parts_two_heaps() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.02, 900), rng.normal(0.7, 0.05, 100)])
    assert 0.3 < otsu(values) < 0.6
    assert otsu(np.array([])) == 0.0


def test_tiles_are_read_in_strips_from_top_to_bottom() -> None:
    shares = np.zeros((3, STRIP + 2), np.float32)
    shares[[0, 2, 1, 0], [0, 1, STRIP, STRIP + 1]] = (0.2, 1.0, 0.9, 0.5)
    shares[1, 1] = 0.19
    assert reading_order(shares).tolist() == [[0, 0], [2, 1], [0, STRIP + 1], [1, STRIP]]


def test_work_ahead_keeps_order_and_waits_for_its_user() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for each in range(20):
            made.append(each)
            yield each

    found = []
    for each in ahead(items(), 2):
        time.sleep(0.002)
        found.append(each)
        assert len(made) <= each + 5  # two wait, one is being made, one is handed over
    assert found == list(range(20))


def test_work_ahead_raises_where_it_is_used_and_ends_with_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise TileError("broken")

    made = ahead(items(), 2)
    assert next(made) == 1
    with pytest.raises(TileError, match=r"^broken$"):
        next(made)
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    early = ahead(endless(), 2)
    next(early)
    early.close()
    assert closed.is_set()
    assert threading.active_count() == before
