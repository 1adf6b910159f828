from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cdt_runtime import FewShotClassifier, read_series, read_tile
from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.errors import PrototypeError, SeriesError, TileError
from cdt_runtime.prototypes import FACTS, TENSORS, Prototypes, fit_prototypes, softmax
from cdt_runtime.reading import ScannedSeries


@pytest.fixture
def classifier(bundle_dir: Path, cache_dir: Path) -> FewShotClassifier:
    return FewShotClassifier.open(bundle_dir, precision="fp32")


@pytest.fixture
def ct(phantom_dir: Path) -> Path:
    return phantom_dir / "new_patient" / "ct"


@pytest.fixture
def tiles(phantom_dir: Path) -> list[Path]:
    return sorted((phantom_dir / "new_patient").glob("*_1.tif"))


def test_a_prediction_says_all_there_is_to_say(
    classifier: FewShotClassifier, tiles: list[Path], ct: Path
) -> None:
    predictions = resting_on_ct(classifier, True).predict(tiles, ct)
    assert [prediction.tile for prediction in predictions] == [path.name for path in tiles]
    for prediction in predictions:
        assert set(prediction.probabilities) == {"invasion_front", "tumor_stroma"}
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert all(0 <= distance <= 2 for distance in prediction.distances.values())
        assert not prediction.abstained
        assert prediction.label == prediction.nearest
        assert max(prediction.probabilities, key=prediction.probabilities.__getitem__) == (
            prediction.label
        )
        assert prediction.ct is not None
        assert prediction.ct.series.startswith("24 slices of 256 x 256")
        assert set(prediction.timings_ms) == {"ct_read", "ct_encode", "tile_read", "classify"}


def resting_on_ct(classifier: FewShotClassifier, ct_context: bool) -> FewShotClassifier:
    gain = {"mean": 0.0012, "ci95": 0.0034, "low": -0.0022}
    changed = replace(classifier.prototypes, ct_context=ct_context, ct_gain=gain)
    classifier.prototypes = changed
    return classifier


def test_without_a_gain_the_ct_changes_nothing_and_its_change_is_shown(
    classifier: FewShotClassifier, bundle_dir: Path, tiles: list[Path], ct: Path
) -> None:
    alone = classifier.predict(tiles)
    on = resting_on_ct(FewShotClassifier.open(bundle_dir, precision="fp32"), True).predict(
        tiles, ct
    )
    off = resting_on_ct(classifier, False).predict(tiles, ct)
    for tile, with_ct, found in zip(alone, on, off, strict=True):
        assert (tile.ct, tile.ct_change) == (None, None)
        assert with_ct.ct is not None
        assert (with_ct.ct.off, with_ct.ct_change) == (None, None)
        assert found.probabilities == tile.probabilities
        assert found.distances == tile.distances
        assert found.label == tile.label
        assert found.ct is not None
        assert found.ct.off == (
            "CT context is off: validation showed no gain from it (+0.1 ± 0.3 points)"
        )
        assert found.ct.series == with_ct.ct.series
        assert found.ct_change is not None
        assert found.ct_change.label == with_ct.label
        assert found.ct_change.nearest == with_ct.nearest
        for name, shift in found.ct_change.shift.items():
            gap = with_ct.probabilities[name] - tile.probabilities[name]
            assert shift == pytest.approx(gap, abs=1e-7)
        assert "classify_with_ct" in found.timings_ms


def test_answers_with_a_ct_have_a_scale_of_their_own(
    classifier: FewShotClassifier, tiles: list[Path], ct: Path
) -> None:
    on = resting_on_ct(classifier, True)
    on.prototypes = replace(on.prototypes, scale=1.0, scale_with_ct=2.0)
    for context, scale in ((None, 1.0), (ct, 2.0)):
        found = on.predict(tiles[:1], context)[0]
        distances = np.array([*found.distances.values()])
        expected = softmax(-scale * distances**2)
        assert np.allclose([*found.probabilities.values()], expected, atol=1e-6)


def test_paired_support_keeps_its_own_patients_ct(
    classifier: FewShotClassifier, tiles: list[Path], ct: Path
) -> None:
    shared = classifier.prototypes
    context, nothing = classifier.context(ct), classifier.context(None)
    one, other = context.tokens, context.tokens + 1
    own = np.concatenate([one, other])
    place = np.array([0, 1, -1, 1])
    paired = replace(shared, ct_tokens=own, ct_of=place)
    files = paired.to_files()
    sha = classifier.bundle.encoder_sha256
    classifier.prototypes = Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256=sha)
    alone = [
        replace(context, tokens=one),
        replace(context, tokens=other),
        nothing,
        replace(context, tokens=other),
    ]
    embedded = np.concatenate(
        [classifier.embed_tokens(shared.tokens[i : i + 1], alone[i]) for i in range(4)]
    )
    expected = fit_prototypes(embedded, shared.labels, 2, shared.fit)
    assert np.allclose(classifier.class_prototypes(context), expected, atol=1e-6)
    classifier._means.clear()
    without = classifier.embed_tokens(shared.tokens, nothing)
    expected = fit_prototypes(without, shared.labels, 2, shared.fit)
    assert np.array_equal(classifier.class_prototypes(nothing), expected)
    classifier.fit(tiles, ["a", "b"], ct)
    assert classifier.prototypes.ct_tokens is None


@pytest.mark.parametrize("fit", ["mean", "shrunk", "ridge"])
def test_prototypes_are_fitted_as_in_the_evaluation(
    classifier: FewShotClassifier, fit: str
) -> None:
    support = classifier.prototypes = replace(classifier.prototypes, fit=fit)
    context = classifier.context(None)
    embedded = classifier.embed_tokens(support.tokens, context)
    expected = fit_prototypes(embedded, support.labels, 2, fit)
    assert np.array_equal(classifier.class_prototypes(context), expected)


def test_a_series_is_encoded_once(
    classifier: FewShotClassifier, bundle_dir: Path, tiles: list[Path], ct: Path
) -> None:
    first = classifier.context(ct)
    second = FewShotClassifier.open(bundle_dir, precision="fp32").context(ct)
    assert first.used is not None
    assert second.used is not None
    assert (first.used.cache_hit, second.used.cache_hit) == (False, True)
    assert np.array_equal(first.tokens, second.tokens)
    assert second.used.series == first.used.series


def test_a_hit_reads_no_pixel(
    classifier: FewShotClassifier, ct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = classifier.context(ct)
    for name in ("reduced", "volume"):
        monkeypatch.setattr(ScannedSeries, name, lambda *_: pytest.fail("pixels are read"))
    assert np.array_equal(classifier.context(ct).tokens, first.tokens)


def test_a_changed_series_is_another_even_behind_the_old_time(
    classifier: FewShotClassifier, ct: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(ct, tmp_path / "copy"))
    assert not hit(classifier, copy)
    assert hit(classifier, copy)
    changed = next(copy.glob("*.dcm"))
    before = changed.stat()
    data = bytearray(changed.read_bytes())
    data[-2] ^= 1  # one pixel, by one
    changed.write_bytes(data)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed.stat().st_mtime_ns == before.st_mtime_ns
    assert not hit(classifier, copy)


def hit(classifier: FewShotClassifier, ct: Path) -> bool:
    """Whether the tokens of a series came from the cache."""
    used = classifier.context(ct).used
    assert used is not None
    return used.cache_hit


def test_a_volume_a_folder_and_arrays_give_the_same(
    classifier: FewShotClassifier, tiles: list[Path], ct: Path
) -> None:
    by_path = classifier.embed(tiles, ct)
    pixels = [read_tile(path).pixels for path in tiles]
    by_value = classifier.embed(pixels, read_series(ct))
    assert np.array_equal(by_path, by_value)
    assert by_path.shape == (2, 32)
    assert by_path.dtype == np.float32
    assert np.allclose(np.linalg.norm(by_path, axis=1), 1, atol=1e-5)


def test_tiles_do_not_depend_on_their_batch(
    classifier: FewShotClassifier, tiles: list[Path]
) -> None:
    many = classifier.predict(tiles * 20)
    assert len(many) == 40
    alone = classifier.predict(tiles[1:])[0]
    for name, chance in many[39].probabilities.items():
        assert alone.probabilities[name] == pytest.approx(chance, abs=1e-6)


def test_without_ct_nothing_of_a_ct_is_reported(
    classifier: FewShotClassifier, tiles: list[Path]
) -> None:
    assert all(prediction.ct is None for prediction in classifier.predict(tiles))


def test_fit_replaces_the_prototypes(
    classifier: FewShotClassifier, phantom_dir: Path, ct: Path
) -> None:
    regions = sorted((phantom_dir / "pathology_data" / "Patient_001").iterdir())
    names = ["left", "right", "left", "right", "middle"]
    classifier.fit(regions[:5], names, ct)
    assert classifier.classes == ("left", "middle", "right")
    assert classifier.prototypes.counts() == {"left": 2, "middle": 1, "right": 2}
    assert classifier.predict(regions[4:5], ct)[0].nearest == "middle"
    distances = classifier.predict(regions[4:5])[0].distances
    assert distances["middle"] == pytest.approx(0, abs=2e-3)


def test_support_and_query_share_their_context(classifier: FewShotClassifier, ct: Path) -> None:
    with_ct = classifier.class_prototypes(classifier.context(ct))
    without = classifier.class_prototypes(classifier.context(None))
    assert with_ct.shape == without.shape == (2, 32)
    assert classifier.class_prototypes(classifier.context(ct)) is with_ct


def test_fit_refuses_what_makes_no_support_set(
    classifier: FewShotClassifier, tiles: list[Path]
) -> None:
    with pytest.raises(PrototypeError, match="2 tiles and 1 labels: give one a tile"):
        classifier.fit(tiles, ["a"])
    with pytest.raises(PrototypeError, match=r"support set has 1 class\(es\) \['a'\]"):
        classifier.fit(tiles, ["a", "a"])
    blank = np.zeros((64, 64, 6), np.uint8)
    with pytest.raises(PrototypeError, match="support tile array shows no tissue: leave it out"):
        classifier.fit([tiles[0], blank], ["a", "b"])
    assert classifier.classes == ("invasion_front", "tumor_stroma")


def test_a_blank_tile_gets_no_answer(classifier: FewShotClassifier) -> None:
    blank = np.full((100, 100, 6), 7, np.uint8)
    prediction = classifier.predict([blank])[0]
    assert prediction.abstained
    assert prediction.label is None
    assert prediction.reason == "no tissue: every channel is almost flat"


def test_low_confidence_gets_no_answer(classifier: FewShotClassifier, tiles: list[Path]) -> None:
    classifier.prototypes = replace(classifier.prototypes, min_confidence=1.0)
    prediction = classifier.predict(tiles[:1])[0]
    assert prediction.abstained
    assert prediction.label is None
    assert prediction.reason is not None
    assert prediction.reason.startswith("low confidence: 0.")
    assert prediction.reason.endswith("at least 1.00 is asked for")


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3), (6, 64, 64), (0, 64, 6)])
def test_arrays_must_have_the_channels_last(
    classifier: FewShotClassifier, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        TileError, match=r"array of shape .*: expected \(H, W, 6\) with channels DA"
    ):
        classifier.predict([np.zeros(shape, np.uint8)])


def test_channels_are_matched_by_name(classifier: FewShotClassifier, real_data: Path) -> None:
    tile = real_data / "mif" / "ABCM22001_B09_MiniCrop.ome.tif"
    with pytest.raises(TileError, match="CD3"):
        classifier.read(tile)
    found = classifier.read(tile, fill_missing=True)
    assert found.channels["PanCK"] == "CK-EPCAM"
    assert found.channels["CD8"] == "CD8a"
    assert found.channels["CD3"] is None
    assert "channels filled with zeros: CD3" in found.warnings
    assert found.array.shape == (6, 64, 64)
    assert not found.array[2].any()


def test_missing_channels_are_filled_only_if_training_hid_some(
    bundle_dir: Path, cache_dir: Path, tiles: list[Path], tmp_path: Path
) -> None:
    bundle = Bundle.open(bundle_dir)
    facts = {
        **bundle.manifest,
        "preprocess": {**bundle.manifest["preprocess"], "fill_missing": False},
    }
    files = {name: bundle.read(name) for name in bundle.manifest["files"]}
    strict = write_bundle(tmp_path / "strict", files, facts)
    with pytest.raises(PrototypeError, match="prototypes were made by encoder"):
        FewShotClassifier(strict)
    old = Prototypes.from_files(files[TENSORS], files[FACTS], encoder_sha256=bundle.encoder_sha256)
    files |= replace(old, encoder_sha256=strict.encoder_sha256).to_files()
    classifier = FewShotClassifier(write_bundle(tmp_path / "strict", files, facts))
    with pytest.raises(TileError, match="--fill-missing: this model was trained with every chann"):
        classifier.read(tiles[0], fill_missing=True)


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "complex64", "int8"])
def test_arrays_of_unfit_types_are_refused(classifier: FewShotClassifier, dtype: str) -> None:
    with pytest.raises(TileError, match=f"array of {dtype}: expected one of uint8, uint16"):
        classifier.predict([np.zeros((64, 64, 6), dtype)])


def test_values_that_are_not_finite_never_become_an_answer(
    classifier: FewShotClassifier, ct: Path
) -> None:
    pixels = np.full((64, 64, 6), 0.5)
    pixels[3, 3, 3] = np.nan
    with pytest.raises(TileError, match="array: samples run from nan to nan, expected 0 to 1"):
        classifier.predict([pixels])
    volume = read_series(ct)
    with pytest.raises(SeriesError, match="some HU are not finite: mask them to -1024 first"):
        classifier.context(replace(volume, hu=volume.hu * np.nan))


def test_a_volume_is_known_by_its_values(classifier: FewShotClassifier, ct: Path) -> None:
    volume = read_series(ct)
    first = classifier.context(volume)
    again = classifier.context(replace(volume, series_hash="another"))
    other = classifier.context(replace(volume, hu=volume.hu - 500))
    assert [context.used.cache_hit for context in (first, again, other) if context.used] == [
        False,
        True,
        False,
    ]
    assert not np.array_equal(first.tokens, other.tokens)


def test_a_volume_needs_its_slices(classifier: FewShotClassifier, ct: Path) -> None:
    volume = read_series(ct)
    with pytest.raises(SeriesError, match=r"volume of shape \(2, 256, 256\): expected \(D, H, W\)"):
        classifier.context(replace(volume, hu=volume.hu[:2]))


@pytest.mark.parametrize("one", ["a.tif", Path("a.tif"), np.zeros((64, 64, 6), np.uint8)])
def test_one_tile_in_place_of_several_is_said(classifier: FewShotClassifier, one: object) -> None:
    for method in (classifier.predict, classifier.embed):
        with pytest.raises(TileError, match="one tile where several are expected: put it in a l"):
            method(one)  # type: ignore[arg-type]


def test_no_tiles_give_no_answers(classifier: FewShotClassifier) -> None:
    assert classifier.predict([]) == []
    assert classifier.embed([]).shape == (0, 32)


def test_a_fit_that_fails_changes_nothing(
    classifier: FewShotClassifier, tiles: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SeriesError):
        classifier.fit(tiles, ["x", "y"], ct=tmp_path / "gone")
    assert classifier.classes == ("invasion_front", "tumor_stroma")


def test_an_oblong_tile_is_warned_about(classifier: FewShotClassifier) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 6), dtype=np.uint8)
    warnings = classifier.predict([pixels])[0].warnings
    assert "oblong tile: only the centre square counts, 50% of its area" in warnings


def test_an_empty_folder_is_no_ct(classifier: FewShotClassifier, tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="no DICOM images in"):
        classifier.context(tmp_path)
