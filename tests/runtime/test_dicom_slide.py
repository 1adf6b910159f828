"""Slides in DICOM: the pixels, sizes and scale of the same slide in TIFF."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from slide_maker import smooth_rgb
from wsi_maker import write_wsi

from cdt_runtime.errors import TileError
from cdt_runtime.reading import Slide, open_slide

pytest.importorskip("wsidicom")

SIZE, MPP = (700, 900), 0.5
MUTANTS = 60
PLACES = np.array([[row, column] for row in range(4) for column in range(5)])


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return smooth_rgb(*SIZE)


@pytest.fixture(scope="module")
def wsi(pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wsi(tmp_path_factory.mktemp("wsi") / "slide", pixels, MPP)


@pytest.fixture(scope="module")
def tiff(pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiff") / "slide.tif"
    storing: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        for step in range(3):
            resolution = (1e4 / MPP / 2**step, 1e4 / MPP / 2**step)
            small = pixels[:: 2**step, :: 2**step]
            file.write(small, resolution=resolution, resolutionunit="CENTIMETER", **storing)
    return path


def tiles_of(slide: Slide, level: int, side: float) -> list[Any]:
    found = slide.tiles(slide.levels[level], side, PLACES, 255, 7)
    return [tile for some in found for tile in some]


def test_it_is_the_slide_in_tiff(wsi: Path, tiff: Path) -> None:
    with open_slide(wsi) as ours, open_slide(tiff) as theirs:
        assert (ours.levels, ours.channels, ours.bits) == (
            theirs.levels,
            theirs.channels,
            theirs.bits,
        )
        assert ours.mpp == pytest.approx(theirs.mpp)
        assert (ours.source, ours.warnings) == ("slide", ())
        small, same = ours.small_copy(255), theirs.small_copy(255)
        np.testing.assert_array_equal(small.pixels, same.pixels)
        for level, side in ((0, 160.0), (1, 80.5)):
            for tile, other in zip(
                tiles_of(ours, level, side), tiles_of(theirs, level, side), strict=True
            ):
                np.testing.assert_array_equal(tile, other)


def test_frames_in_jpeg_are_read_as_colour(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    with open_slide(write_wsi(tmp_path / "slide", pixels, MPP, jpeg=True)) as slide:
        tile = tiles_of(slide, 0, 160.0)[0]
    assert np.abs(tile.astype(int) - pixels[:160, :160]).max() <= 6


def test_one_file_is_one_level(wsi: Path) -> None:
    with open_slide(wsi / "level_1.dcm") as slide:
        assert [(one.height, one.width) for one in slide.levels] == [(350, 450)]
        assert slide.mpp == pytest.approx(1.0)


def test_a_report_can_refer_to_its_files(wsi: Path) -> None:
    with open_slide(wsi) as slide:
        uids = [one["SOPInstanceUID"]["Value"][0] for one in slide.references]
        assert "Doe" not in repr(slide)
    files = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(wsi.iterdir())]
    assert uids == [one.SOPInstanceUID for one in files]


def _cut(folder: Path) -> None:
    path = folder / "level_0.dcm"
    path.write_bytes(path.read_bytes()[:-300_000])


def _another_slide(folder: Path) -> None:
    other = write_wsi(folder.parent / "b", smooth_rgb(300, 300), MPP, levels=1, seed="other")
    shutil.copy(other / "level_0.dcm", folder / "other.dcm")


def _oblong(folder: Path) -> None:
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        measures.PixelSpacing = [measures.PixelSpacing[0], 2 * measures.PixelSpacing[1]]
        data.save_as(path)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("no DICOM")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_emptied, r"slide: is a folder without DICOM files \(3 files seen\)"),
        (_oblong, "slide: has pixels of .* microns: expected square ones"),
        (_another_slide, "slide: holds 2 slides: give the folder of one slide's files"),
    ],
)
def test_what_can_not_be_read_is_one_line(wsi: Path, tmp_path: Path, harm: Any, said: str) -> None:
    folder = tmp_path / "slide"
    shutil.copytree(wsi, folder)
    harm(folder)
    with pytest.raises(TileError, match=said) as caught, open_slide(folder):
        pass
    assert "\n" not in str(caught.value)
    assert "Doe" not in str(caught.value)


def test_damaged_frames_cost_their_tiles_alone(wsi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slide"
    shutil.copytree(wsi, folder)
    _cut(folder)
    with open_slide(folder) as slide:
        found = tiles_of(slide, 0, 160.0)
    assert isinstance(found[0], np.ndarray)
    assert isinstance(found[-1], str)
    assert "can't be decoded" in found[-1]


@pytest.mark.parametrize("jpeg", [False, True])
def test_damaged_bytes_are_read_or_refused_in_one_line(tmp_path: Path, jpeg: bool) -> None:
    folder = write_wsi(tmp_path / "slide", smooth_rgb(160, 160), MPP, levels=2, jpeg=jpeg)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    source = random.Random(3)
    refused = 0
    for _ in range(MUTANTS):
        for path, data in whole.items():
            changed = bytearray(data)
            for _ in range(source.choice([1, 4, 40])):
                first = source.choice([0, 132, 2000])
                changed[source.randrange(first, min(len(data), first + 3000))] = source.randrange(
                    256
                )
            cut = source.randrange(200, len(data)) if source.random() < 0.2 else len(data)
            path.write_bytes(changed[:cut])
        try:
            with open_slide(folder) as slide:
                slide.small_copy(255)
                tiles_of(slide, 0, 40.0)
        except TileError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
            assert "Doe" not in str(error)  # noqa: PT017
    assert 0 < refused < MUTANTS


def test_a_series_of_ct_is_no_slide(ct_folder: Path) -> None:
    with pytest.raises(TileError, match="ct: holds no whole slide in DICOM"), open_slide(ct_folder):
        pass


@pytest.fixture
def ct_folder(tmp_path: Path) -> Path:
    from dicom_maker import write_series

    write_series(tmp_path / "ct")
    return tmp_path / "ct"
