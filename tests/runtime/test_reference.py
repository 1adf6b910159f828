"""Tiles beside those that the model knows: what is foreign or blurred gets no answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from cdt_runtime import FewShotClassifier
from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.errors import BundleError
from cdt_runtime.reference import REFERENCE, Reference
from cdt_runtime.tile import read_tile
from cdt_runtime.tile_statistics import sharpness, statistics_count, tile_statistics

Tile = NDArray[np.uint8]


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return Bundle.open(bundle_dir)


@pytest.fixture
def classifier(bundle: Bundle, cache_dir: Path) -> FewShotClassifier:
    return FewShotClassifier(bundle, backend="onnxruntime")


@pytest.fixture
def tile_array(phantom_dir: Path) -> Tile:
    tile = read_tile(sorted((phantom_dir / "new_patient").glob("*.tif"))[0])
    return np.asarray(tile.pixels, np.uint8)


def noise(seed: int = 0, channels: int = 3, side: int = 64) -> Tile:
    return np.random.default_rng(seed).integers(0, 256, (channels, side, side), dtype=np.uint8)


def test_statistics_are_what_they_say() -> None:
    ramp = np.zeros((2, 64, 64), np.uint8)
    ramp[0] = np.arange(64, dtype=np.uint8)[None] * 4
    ramp[1] = 255 - ramp[0]
    found = tile_statistics(ramp)
    assert found.shape == (statistics_count(2),)
    assert found[0] == pytest.approx(124 / 255, abs=1e-5)
    spread = (np.arange(0, 64, 2) * 4 / 255).std() + 0.01
    assert found[2] == pytest.approx(np.log(spread), abs=1e-4)
    assert found[4] == pytest.approx(0, abs=1e-4)  # symmetric
    steps = [4, 8, 16]  # across, at each scale; none down
    assert found[[6, 8, 10]] == pytest.approx(np.log(np.array(steps) / 255 + 0.002), abs=1e-4)
    assert -1 <= found[12] < -0.9


def test_bits_and_fractions_give_the_same() -> None:
    tile = noise()
    fractions = tile.astype(np.float32) / 255
    assert tile_statistics(tile) == pytest.approx(tile_statistics(fractions), abs=1e-5)


def test_sharpness_falls_with_blur() -> None:
    tile = noise(side=128).astype(np.float32) / 255
    soft = (tile[:, 1:, 1:] + tile[:, :-1, 1:] + tile[:, 1:, :-1] + tile[:, :-1, :-1]) / 4
    sharp, blurred = (float(sharpness(tile_statistics(one), 3)) for one in (tile, soft))
    assert blurred < sharp - 0.3


def a_reference(limit: float = 3.0) -> Reference:
    size = statistics_count(3)
    return Reference(
        means=np.zeros((2, size), np.float32) + np.array([[0.0], [10.0]], np.float32),
        counts=np.array([3, 1], np.int64),
        whitener=np.eye(size, dtype=np.float32),
        limit=np.array([limit], np.float32),
        least_sharpness=np.array([0.5], np.float32),
        density_mean=np.full(3, 0.5, np.float32),
        density_spread=np.full(3, 0.2, np.float32),
    )


def test_distance_is_to_the_nearest_class_or_enrolled_tile() -> None:
    reference, size = a_reference(), statistics_count(3)
    tiles = np.stack([np.full(size, value, np.float32) for value in (1, 9, 20)])
    near = np.sqrt(size) * np.array([1 / np.sqrt(4 / 3), 1 / np.sqrt(2), 10 / np.sqrt(2)])
    assert reference.distances(tiles, tiles[:0]) == pytest.approx(near, rel=1e-5)
    assert reference.distances(tiles, tiles[2:])[2] == 0
    assert reference.unlikeness(tiles, tiles[:0]) == pytest.approx(near / 3, rel=1e-5)


def test_a_reference_comes_back() -> None:
    reference = a_reference()
    back = Reference.from_bytes(reference.to_bytes(), 3)
    assert np.array_equal(back.means, reference.means)
    assert back.limit == reference.limit


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "can't be read"),
        ({"limit": None}, "can't be read"),
        ({"limit": np.array([0.0], np.float32)}, "a limit or a count is not positive"),
        ({"whitener": np.zeros(3, np.float32)}, r"whitener of shape \(3,\)"),
        ({"limit": np.array([np.nan], np.float32)}, "expected finite"),
    ],
)
def test_a_damaged_reference_is_said(
    changed: dict[str, NDArray[np.float32] | None] | None, words: str
) -> None:
    data = b"nothing"
    if changed is not None:
        arrays = load(a_reference().to_bytes()) | changed
        data = save({name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(BundleError, match=words):
        Reference.from_bytes(data, 3)


def test_a_bundle_without_one_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    files = {name: bundle.read(name) for name in bundle.manifest["files"] if name != REFERENCE}
    without = write_bundle(tmp_path / "without", files, bundle.manifest)
    with pytest.raises(BundleError, match=REFERENCE):
        FewShotClassifier(without, backend="onnxruntime")


FOREIGN: dict[str, Callable[[Tile], Tile]] = {
    "noise": lambda tile: noise(1, tile.shape[2], len(tile)).transpose(1, 2, 0),
    "inverted": lambda tile: 255 - tile,
    "turned channels": lambda tile: np.roll(tile, 1, axis=2),
    "half the light": lambda tile: tile // 2,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tiles_get_no_answer(
    classifier: FewShotClassifier, tile_array: Tile, kind: str
) -> None:
    known, foreign = classifier.predict([tile_array, FOREIGN[kind](tile_array)])
    assert known.unlikeness < 1
    assert foreign.unlikeness > 1
    assert foreign.abstained
    assert foreign.reason is not None
    assert foreign.reason.startswith("unlike the training tiles: colour and texture lie ")


def test_what_is_enrolled_is_known(classifier: FewShotClassifier, tile_array: Tile) -> None:
    foreign = 255 - tile_array
    before = classifier.predict([foreign])[0]
    classifier.fit([tile_array, foreign], ["ours", "theirs"])
    after = classifier.predict([foreign])[0]
    assert before.unlikeness > 1
    assert after.unlikeness < 0.01
