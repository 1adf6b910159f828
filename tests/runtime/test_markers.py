"""Channels are found by name: what matches, what does not, and what is said."""

from __future__ import annotations

import numpy as np
import pytest

from cdt_runtime.errors import TileError
from cdt_runtime.markers import MARKERS, is_marker, is_placeholder, names_of_stems
from cdt_runtime.tile import RGB, Tile, match_channels


def tile_of(*channels: str) -> Tile:
    """A 2 x 2 tile whose channel i holds the value i + 1."""
    pixels = np.broadcast_to(
        np.arange(1, len(channels) + 1, dtype=np.uint16), (2, 2, len(channels))
    )
    return Tile(pixels, channels, 16, None, "0" * 64, "a.tif")


@pytest.mark.parametrize(
    ("expected", "name"),
    [
        ("DAPI", "dapi"),
        ("DAPI", "Hoechst 33342"),
        ("DAPI", "DNA"),
        ("PanCK", "PAN-CK"),
        ("PanCK", "pan_ck"),
        ("PanCK", "Pan-Cytokeratin"),
        ("PanCK", "Cytokeratin"),
        ("PanCK", "CK"),
        ("PanCK", "CK-EPCAM"),
        ("PanCK", "AE1/AE3"),
        ("CD3", "CD3e"),
        ("CD3", "CD3 (Opal 570)"),
        ("CD8", "CD8a"),
        ("FOXP3", "FoxP-3"),
        ("PDL1", "PD-L1"),
        ("PDL1", "CD274"),
        ("GZMB", "gzmb"),
    ],
)
def test_one_marker_under_two_names(expected: str, name: str) -> None:
    matched, mapping, filled = match_channels(tile_of("CD20", name), [expected])
    assert matched.tolist() == [[[2], [2]], [[2], [2]]]
    assert matched.dtype == np.uint16
    assert mapping == {expected: name}
    assert filled == ()


@pytest.mark.parametrize(("expected", "name"), [("CD3", "CD31"), ("CD8", "CD80"), ("PDL1", "PD1")])
def test_like_names_are_not_the_same_marker(expected: str, name: str) -> None:
    with pytest.raises(TileError, match=f"lacks {expected}: it has {name}"):
        match_channels(tile_of(name), [expected])


def test_the_order_is_the_models() -> None:
    tile = tile_of("FOXP3", "PDL1", "CD8a", "CK-EPCAM", "CD3", "DAPI")
    matched, mapping, _ = match_channels(tile, MARKERS)
    assert matched[0, 0].tolist() == [6, 4, 5, 3, 1, 2]
    assert mapping["PanCK"] == "CK-EPCAM"


def test_the_exact_name_goes_before_a_synonym() -> None:
    matched, mapping, _ = match_channels(tile_of("CK", "PanCK"), ["PanCK"])
    assert matched[0, 0].tolist() == [2]
    assert mapping == {"PanCK": "PanCK"}


def test_two_synonyms_of_one_marker_are_refused() -> None:
    with pytest.raises(
        TileError, match=r"a\.tif: has two channels for 'PanCK': 'CK' and 'Cytokeratin'"
    ):
        match_channels(tile_of("CK", "Cytokeratin"), ["PanCK"])


def test_a_missing_marker_lists_both_sets_and_the_cures() -> None:
    with pytest.raises(TileError) as caught:
        match_channels(tile_of("DAPI", "CD3"), ["DAPI", "CD3", "CD8"])
    assert str(caught.value) == (
        "a.tif: lacks CD8: it has DAPI, CD3, the model expects DAPI, CD3, CD8; "
        "--channels names a file's channels, "
        "--fill-missing fills them with zeros if the model was trained for it"
    )


def test_missing_markers_are_filled_on_demand() -> None:
    matched, mapping, filled = match_channels(
        tile_of("CD3", "DAPI"), ["DAPI", "CD3", "CD8"], fill_missing=True
    )
    assert matched[0, 0].tolist() == [2, 1, 0]
    assert mapping == {"DAPI": "DAPI", "CD3": "CD3", "CD8": None}
    assert filled == ("CD8",)


def test_nothing_is_filled_where_nothing_matches() -> None:
    with pytest.raises(TileError, match="lacks CD8, CD3"):
        match_channels(tile_of("SOX10"), ["CD8", "CD3"], fill_missing=True)


@pytest.mark.parametrize(
    ("found", "expected", "says"),
    [
        (("gray",), RGB, "is gray, the model expects RGB: give the colour image; gray H&E fails"),
        (("DAPI", "CD3", "CD8"), RGB, "has the channels DAPI, CD3, CD8, the model expects R, G, B"),
        (RGB, MARKERS, "has the channels R, G, B, the model expects DAPI, PanCK"),
        (("gray",), MARKERS, "lacks DAPI, PanCK, CD3, CD8, FOXP3, PDL1: it has gray"),
        (("CK", "CD3"), ("PanCK", "CK"), "the model expects one marker twice: PanCK, CK"),
    ],
)
@pytest.mark.parametrize("fill", [False, True])
def test_kinds_do_not_stand_in_for_each_other(
    found: tuple[str, ...], expected: tuple[str, ...], says: str, fill: bool
) -> None:
    with pytest.raises(TileError, match=says):
        match_channels(tile_of(*found), expected, fill_missing=fill)


def test_rgb_and_gray_pass_as_they_are() -> None:
    assert match_channels(tile_of(*RGB), RGB)[0][0, 0].tolist() == [1, 2, 3]
    assert match_channels(tile_of("gray"), ["gray"])[0][0, 0].tolist() == [1]


@pytest.mark.parametrize("name", ["", "0", "Channel 3", "ch_01", "C:1", "Channel:0:1", "Page 2"])
def test_names_that_only_count(name: str) -> None:
    assert is_placeholder(name)


@pytest.mark.parametrize("name", ["CD3", "C1q", "PD1", "CK7", "chromogranin", "DAPI"])
def test_names_that_are_markers(name: str) -> None:
    assert not is_placeholder(name)


@pytest.mark.parametrize("name", ["FITC", "Cy5", "Opal 570", "CD3 x"])
def test_dyes_are_no_markers(name: str) -> None:
    assert not is_marker(name)
    assert is_marker("CD3 (Opal 570)")


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["CD3", "DAPI"], ["CD3", "DAPI"]),
        (["region_001_CD3", "region_001_PD-L1"], ["CD3", "PD-L1"]),
        (["CD8_region_001", "dapi_region_001"], ["CD8", "dapi"]),
        (["p1_CD3_mIF", "p1_FOXP3_mIF"], ["CD3", "FOXP3"]),
        (["p1_GZMB", "p1_CD20"], ["GZMB", "CD20"]),
        (["ck_panel_CD3", "ck_panel_CD8"], ["CD3", "CD8"]),
    ],
)
def test_a_marker_is_found_in_the_stem(stems: list[str], names: list[str]) -> None:
    assert names_of_stems(stems) == names
