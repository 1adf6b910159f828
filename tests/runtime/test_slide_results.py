"""What is written of a slide, read again by other programs' readers."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from shapely.geometry import Polygon, box, shape
from shapely.ops import unary_union

from cdt_runtime.slides.colours import class_colours
from cdt_runtime.slides.geojson import write_geojson
from cdt_runtime.slides.heatmap import halved, write_heatmap
from cdt_runtime.slides.outlines import areas
from cdt_runtime.slides.overview import CANT_TELL, write_overview
from cdt_runtime.slides.tissue import Small

CLASSES = ("tumor_stroma", "invasion_front", "Drüse")
LABELS = np.array(
    [
        [0, 0, 0, -1, 1],
        [0, 1, 0, 1, -1],
        [0, 0, 0, -1, 2],
        [-1, -1, -1, 0, 2],
    ],
    np.int16,
)
NONE: tuple[Any, tuple[str, ...]] = (np.full_like(LABELS, -1), ())


def chances_of(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Probabilities that decide as the labels say; NaN without an answer."""
    laid = np.full((len(CLASSES), *labels.shape), 0.1, np.float32)
    for index in range(len(CLASSES)):
        laid[index][labels == index] = 0.8
    laid[:, labels < 0] = np.nan
    return laid


def polygons(path: Path) -> list[tuple[str, Polygon]]:
    features = json.loads(path.read_text("utf-8"))["features"]
    return [(each["properties"]["name"], shape(each["geometry"])) for each in features]


@given(
    labels=arrays(
        np.int16, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-1, 2)
    )
)
@settings(max_examples=100, deadline=None)
def test_areas_are_valid_polygons_that_cover_exactly_their_tiles(labels: Any) -> None:
    found = areas(labels)
    shapes = []
    for area in found:
        outer, *holes = [[(column, row) for row, column in ring] for ring in area.rings]
        polygon = Polygon(outer, holes)
        assert polygon.is_valid
        cells = unary_union([box(column, row, column + 1, row + 1) for row, column in area.cells])
        assert polygon.symmetric_difference(cells).area == 0
        assert {int(labels[row, column]) for row, column in area.cells} == {area.label}
        assert all(corner[0] == after[0] or corner[1] == after[1] for corner, after in _sides(area))
        shapes.append((area.label, polygon))
    assert sum(polygon.area for _, polygon in shapes) == (labels >= 0).sum()
    for (label, one), (other, two) in combinations(shapes, 2):
        shared = one.intersection(two).length
        assert label != other or shared == 0  # what shares an edge and a class is one area


def _sides(area: Any) -> list[tuple[Any, Any]]:
    return [side for ring in area.rings for side in pairwise(ring)]


def test_a_hole_and_tiles_that_touch_at_a_corner() -> None:
    found = {(area.label, len(area.cells)): area for area in areas(LABELS)}
    assert set(found) == {(0, 8), (1, 1), (0, 1), (2, 2)}
    assert len(areas(LABELS)) == 6  # class 1: the hole and two that touch at a corner alone
    ring, hole = found[0, 8].rings
    assert (len(ring), len(hole)) == (5, 5)


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    path = tmp_path / "areas.geojson"
    count = write_geojson(
        path, LABELS, chances_of(LABELS), CLASSES, NONE, side=448.5, microns=112.0
    )
    content = json.loads(path.read_text("utf-8"))
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == count == 6
    first = content["features"][0]
    assert (first["type"], first["geometry"]["type"]) == ("Feature", "Polygon")
    assert first["properties"] == {
        "objectType": "annotation",
        "name": "tumor_stroma",
        "classification": {"name": "tumor_stroma", "color": [213, 94, 0]},
        "measurements": {
            "Probability tumor_stroma": pytest.approx(0.8),
            "Probability invasion_front": pytest.approx(0.1),
            "Probability Drüse": pytest.approx(0.1),
            "Tiles": 8.0,
            "Area µm^2": 8 * 112.0**2,
        },
    }
    polygon = polygons(path)[0][1]
    assert polygon.exterior.is_ccw  # RFC 7946
    assert not polygon.interiors[0].is_ccw
    assert polygon.bounds == (0.0, 0.0, 3 * 448.5, 3 * 448.5)
    assert polygon.area == pytest.approx(8 * 448.5**2)
    assert sorted(name for name, _ in polygons(path)) == sorted(
        ["tumor_stroma"] * 2 + ["invasion_front"] * 3 + ["Drüse"]
    )


def test_geojson_without_answers_is_empty(tmp_path: Path) -> None:
    labels = np.full((2, 3), -1, np.int16)
    path = tmp_path / "areas.geojson"
    none = (np.full((2, 3), -1, np.int16), ())
    assert write_geojson(path, labels, chances_of(labels), CLASSES, none, side=8, microns=4) == 0
    assert json.loads(path.read_text("utf-8"))["features"] == []


def test_areas_without_an_answer_say_why(tmp_path: Path) -> None:
    labels = np.array([[0, -1, -1]], np.int16)
    reasons = (np.array([[-1, 1, 1]], np.int16), ("blurred", "unlike training"))
    path = tmp_path / "areas.geojson"
    write_geojson(path, labels, chances_of(labels), CLASSES, reasons, side=8, microns=4)
    area = json.loads(path.read_text("utf-8"))["features"][1]["properties"]
    assert area["classification"]["name"] == "can't tell: unlike training"
    assert area["measurements"] == {"Tiles": 2.0, "Area µm^2": 32.0}


def written_map(tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(3), (150, 301)).transpose(2, 0, 1).astype(np.float32)
    chances[:, 40:60, 10:200] = np.nan
    path = tmp_path / "heatmap.ome.tif"
    write_heatmap(path, chances, CLASSES, 112.0)
    return path, chances


def test_the_heat_map_is_read_back_by_libtiff(tmp_path: Path) -> None:
    path, chances = written_map(tmp_path)
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (3, (301, 150))
        for index in range(3):
            image.seek(index)
            assert np.array_equal(np.asarray(image), chances[index], equal_nan=True)


def test_the_heat_map_says_what_its_channels_and_pixels_are(tmp_path: Path) -> None:
    path, chances = written_map(tmp_path)
    with tifffile.TiffFile(path) as file:
        root = ElementTree.fromstring(file.ome_metadata or "")
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [
            (3, 150, 301),
            (3, 75, 151),
            (3, 38, 76),
            (3, 19, 38),
        ]
        assert np.array_equal(levels[1].asarray(), halved(chances), equal_nan=True)
    (pixels,) = (node for node in root.iter() if node.tag.endswith("}Pixels"))
    assert pixels.attrib["PhysicalSizeX"] == pixels.attrib["PhysicalSizeY"] == "112.0"
    assert pixels.attrib["PhysicalSizeXUnit"] == "µm"
    names = [node.attrib["Name"] for node in root.iter() if node.tag.endswith("}Channel")]
    assert tuple(names) == CLASSES


def test_a_level_averages_what_has_data() -> None:
    nan = np.nan
    chances = np.array([[[0.2, nan, 0.5], [0.4, nan, 0.7], [nan, nan, 0.9]]], np.float32)
    assert np.allclose(halved(chances), [[[0.3, 0.6], [nan, 0.9]]], equal_nan=True)


def test_the_overview_shows_each_class_in_its_colour(tmp_path: Path) -> None:
    seen = np.ones((200, 300, 3), np.float32)
    small = Small(seen, (10.0, 10.0), np.zeros((200, 300), bool))
    labels = np.array([[0, 1, -1], [-1, 2, -1]], np.int16)
    looked_at = np.array([[1, 1, 0], [1, 1, 1]], bool)
    path = tmp_path / "overview.png"
    shares = (0.2, 0.2, 0.2, 0.4)
    write_overview(path, small, ("R", "G", "B"), labels, looked_at, CLASSES, shares, 1000.0)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colours = (*class_colours(3), CANT_TELL)
    for (row, column), index in {(0, 0): 0, (0, 1): 1, (1, 1): 2, (1, 0): 3, (1, 2): 3}.items():
        expected = 255 * 0.55 + 0.45 * np.array(colours[index])
        assert np.abs(picture[row * 100 + 50, column * 100 + 50] - expected).max() <= 1
    assert (picture[50, 250] == 255).all()  # not looked at
    legend = picture[200:].reshape(-1, 3)
    for colour in colours:
        assert (legend == colour).all(axis=1).any()


def test_colours_are_apart_for_many_classes() -> None:
    colours = class_colours(20)
    assert len(set(colours)) == 20
    assert class_colours(3) == colours[:3]
