"""Sets of classes: how often they hold the right one, and when there can be none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cdt_runtime import FewShotClassifier
from cdt_runtime.conformal import certify, own_chances
from cdt_runtime.errors import InputError
from cdt_runtime.prototypes import Prototypes


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("tiles", [19, 40, 250])
def test_sets_hold_the_class_as_often_as_asked(level: float, tiles: int) -> None:
    rng = np.random.default_rng(0)
    held = [
        (rng.random(100) >= (certify(rng.random(tiles), level).least or 0)).mean()
        for _ in range(400)
    ]
    assert abs(np.mean(held) - level) < 0.01


@pytest.mark.parametrize(
    ("level", "needed"), [(0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1)]
)
def test_too_few_tiles_certify_nothing(level: float, needed: int) -> None:
    assert certify(np.linspace(0.1, 0.9, needed), level).least is not None
    found = certify(np.linspace(0.1, 0.9, needed - 1), level)
    assert found.needed == needed
    assert found.classes({"a": 0.9, "b": 0.1}) is None
    assert f"they take {needed} or more tiles" in str(found.note)
    assert f"there are {needed - 1}: enrol more" in str(found.note)


def test_the_likeliest_come_first_and_there_may_be_none() -> None:
    found = certify(np.array([0.2, 0.5, 0.7, 0.9]), 0.6)
    assert found.note is None
    assert found.classes({"a": 0.45, "b": 0.52, "c": 0.03}) == ("b",)
    assert replace(found, least=0.4).classes({"a": 0.45, "b": 0.52, "c": 0.03}) == ("b", "a")
    assert replace(found, least=0.6).classes({"a": 0.45, "b": 0.52, "c": 0.03}) == ()


def a_support(enrolled: list[int]) -> tuple[Prototypes, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 5)
    embedded = rng.normal(size=(10, 8)) + 9 * np.eye(8)[labels]
    embedded = (embedded / np.linalg.norm(embedded, axis=1, keepdims=True)).astype(np.float32)
    support = Prototypes(
        classes=("a", "b"),
        labels=labels,
        tokens=np.zeros((10, 3, 8), np.float32),
        support_sha256=tuple(f"{place:064x}" for place in range(10)),
        encoder_sha256="e" * 64,
        scale=4.0,
        scale_with_ct=4.0,
        min_confidence=0.6,
        fit="mean",
        ct_context=False,
        ct_gain=None,
        calibration={},
        statistics=np.zeros((len(enrolled), 2), np.float32) if enrolled else None,
        statistics_of=np.array(enrolled, np.int64) if enrolled else None,
    )
    return support, embedded


def test_only_tiles_that_training_did_not_see_count() -> None:
    support, embedded = a_support([])
    assert len(own_chances(support, embedded, False)) == 0
    support, embedded = a_support([0, 1, 2])
    assert len(own_chances(support, embedded, False)) == 0  # none of class b
    support, embedded = a_support([0, 1, 5, 6])
    found = own_chances(support, embedded, False)
    assert found.shape == (4,)
    assert (found > 0.5).all()
    held = replace(support, held_out=(0.9, 0.8))
    assert own_chances(held, embedded, False).tolist() == [0.9, 0.8]
    assert len(own_chances(held, embedded, True)) == 4  # those of the test fold had no CT


def test_a_bundle_certifies_by_its_test_fold_until_the_support_changes(
    bundle_dir: Path, phantom_dir: Path, cache_dir: Path
) -> None:
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime", coverage=0.8)
    tiles = sorted(str(path) for path in (phantom_dir / "new_patient").glob("*.tif"))
    shipped = classifier.certificate(classifier.context(None))
    assert shipped.tiles == classifier.bundle.manifest["reference"]["held_out"]
    assert all(one.prediction_set is not None for one in classifier.predict(tiles))
    classifier.fit(tiles, [Path(tile).stem[:-2] for tile in tiles])
    own = classifier.certificate(classifier.context(None))
    assert own.tiles == len(tiles)
    foreign = np.full((64, 64, len(classifier.preprocess.channels)), 9, np.uint8)
    assert classifier.predict([foreign])[0].prediction_set is None


def test_views_and_sets_exclude_each_other(bundle_dir: Path) -> None:
    with pytest.raises(InputError, match="certified for tiles as they are"):
        FewShotClassifier.open(bundle_dir, tta=True, coverage=0.9)


def test_the_mean_of_four_orientations_does_not_hang_on_how_a_tile_lies(
    bundle_dir: Path, phantom_dir: Path, cache_dir: Path
) -> None:
    opened = [
        FewShotClassifier.open(bundle_dir, backend="onnxruntime", tta=tta) for tta in (False, True)
    ]
    tile = opened[0].read(sorted((phantom_dir / "new_patient").glob("*.tif"))[0])
    pixels = tile.array.transpose(1, 2, 0)
    turned = np.ascontiguousarray(np.rot90(pixels))
    plain, mean = (
        [list(one.probabilities.values()) for one in classifier.predict([pixels, turned])]
        for classifier in opened
    )
    assert np.abs(np.subtract(*mean)).max() < 1e-5
    assert np.abs(np.subtract(*plain)).max() > 1e-5
