"""What an answer rests on, and the page that shows it, in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdt_runtime import FewShotClassifier
from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.cli import infer_command
from cdt_runtime.evidence.found import GRID, Evidence, covered_slices, covered_tiles, find_evidence
from cdt_runtime.evidence.page import slide_page, tile_page
from cdt_runtime.prototypes import FACTS

Shell = Callable[..., tuple[int, str, str]]
BROWSER = next(
    (found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def classifier(bundle_dir: Path) -> FewShotClassifier:
    return FewShotClassifier.open(bundle_dir, backend="onnxruntime", coverage=0.8)


@pytest.fixture(scope="module")
def evidence(classifier: FewShotClassifier, phantom_dir: Path) -> Evidence:
    tile = classifier.read(sorted((phantom_dir / "new_patient").glob("*.tif"))[0])
    return find_evidence(classifier, tile, classifier.context(phantom_dir / "new_patient" / "ct"))


def test_each_part_of_a_tile_is_covered_once_by_its_mean() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    copies = covered_tiles(tile)
    assert copies.shape == (GRID * GRID, 3, 64, 64)
    changed = (copies != tile).any(axis=1)
    assert changed.any(axis=0).all()
    middle = copies[GRID * 3 + 3, :, 20:36, 20:36]
    assert (middle == tile.mean(axis=(1, 2)).astype(np.uint8)[:, None, None]).all()
    assert changed[GRID * 3 + 3].sum() <= 16 * 16


def test_support_tiles_share_the_answer(evidence: Evidence, classifier: FewShotClassifier) -> None:
    support = classifier.prototypes
    assert len(evidence.support) == len(support.labels)
    assert sum(one.share for one in evidence.support) == pytest.approx(1)
    similar = [one.similarity for one in evidence.support]
    assert similar == sorted(similar, reverse=True)
    assert {one.sha256 for one in evidence.support} == set(support.support_sha256)
    assert not any(one.enrolled for one in evidence.support)


def test_leaving_a_tile_out_is_what_fitting_without_it_gives(
    evidence: Evidence, classifier: FewShotClassifier, phantom_dir: Path
) -> None:
    tiles = sorted(str(path) for path in (phantom_dir / "new_patient").glob("*.tif"))
    labels = [Path(tile).stem[:-2] for tile in tiles]
    other = FewShotClassifier(classifier.bundle, backend="onnxruntime")
    other.fit(tiles[1:], labels[1:])
    found = find_evidence(other, other.read(tiles[0]), other.context(None))
    first = found.support[0]
    assert first.enrolled
    assert first.without is not None
    kept = [tile for tile in tiles[1:] if other.read(tile).sha256 != first.sha256]
    other.fit(kept, [Path(tile).stem[:-2] for tile in kept])
    again = other.predict([tiles[0]])[0].probabilities
    best = max(again, key=lambda name: again[name])
    assert first.without == (best, pytest.approx(again[best], abs=1e-5))


def test_covering_changes_the_answer_by_what_is_covered(
    evidence: Evidence, classifier: FewShotClassifier
) -> None:
    place = classifier.classes.index(evidence.likeliest)
    covered = covered_tiles(evidence.tile)[[5]]
    context = classifier.context(None)
    left = classifier.classify(covered, context)[0][0, place]
    whole = evidence.prediction.probabilities[evidence.likeliest]
    assert evidence.relevance[0, 5] == pytest.approx(whole - left, abs=1e-5)


def test_slices_are_covered_where_the_answer_rests_on_the_ct(
    bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    bundle = Bundle.open(bundle_dir)
    files = {name: bundle.read(name) for name in bundle.manifest["files"]}
    files[FACTS] = json.dumps(json.loads(files[FACTS]) | {"ct_context": True}).encode()
    own = write_bundle(tmp_path / "own", files, bundle.manifest)
    classifier = FewShotClassifier(own, backend="onnxruntime")
    patient = phantom_dir / "new_patient"
    tile = classifier.read(sorted(patient.glob("*.tif"))[0])
    context = classifier.context(patient / "ct")
    read = partial(classifier.contexts.input_of_folder, patient / "ct", None, False)
    found = find_evidence(classifier, tile, context, read)
    depth = classifier.preprocess.ct_depth
    assert found.slices is not None
    assert found.slices.shape == (depth,)
    covered = dict(covered_slices(read()))["without slice 2"]
    assert (covered != read()).any(axis=(0, 1, 3, 4)).tolist() == [n == 2 for n in range(depth)]
    there = classifier.contexts.of_input(covered, context, "again")
    place = classifier.classes.index(found.likeliest)
    left = classifier.classify(tile.array[None], there)[0][0, place]
    whole = found.prediction.probabilities[found.likeliest]
    assert found.slices[2] == pytest.approx(whole - left, abs=1e-5)
    page = tile_page(found, classifier)
    assert f"The {depth} slices that the model sees" in page
    assert find_evidence(classifier, tile, classifier.context(None), read).slices is None


class Outline(HTMLParser):
    """Tags that are not closed, and every address that the page names."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alone = {"meta", "img", "input", "br"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.alone:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(evidence: Evidence, classifier: FewShotClassifier) -> None:
    page = tile_page(evidence, classifier)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.addresses
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert classifier.bundle.identity in page
    assert evidence.prediction.sha256 in page


def test_names_are_text_not_markup(evidence: Evidence, classifier: FewShotClassifier) -> None:
    named = replace(evidence, prediction=replace(evidence.prediction, tile="<b onload=x>.tif"))
    page = tile_page(named, classifier)
    assert "<b onload" not in page
    assert "&lt;b onload=x&gt;.tif" in page


def test_the_command_writes_it(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    def infer(*words: object) -> tuple[int, str, str]:
        return shell(infer_command, *words, "--bundle", bundle_dir)

    tiles = sorted((phantom_dir / "new_patient").glob("*.tif"))
    path = tmp_path / "card.html"
    code, out, err = infer("--no-ct", tiles[0], "--card", path)
    assert code == 0
    assert f"card: {path}" in err
    assert out.split(":")[0] in path.read_text("utf-8")
    code, _, err = infer("--no-ct", *tiles[:2], "--card", path)
    assert code == 2
    assert "--card with 2 tiles: give one at a time" in err
    code, _, err = infer("--no-ct", tiles[0], "--card", tmp_path / "nowhere" / "card.html")
    assert code == 2
    assert "can't be written (No such file or directory)" in err


SUMMARY: dict[str, Any] = {
    "slide": "a slide.svs",
    "out": "out",
    "files": ["tiles.csv"],
    "tile_microns": 112.0,
    "tiles": 10,
    "labels": {"a": 6, "b": 1},
    "abstained": 3,
    "unreadable": 0,
    "reasons": {"blurred": 2, "unlike training": 1},
    "ct": None,
    "backend": "engine",
    "bundle": "bundle",
    "training_data": "data",
}


def test_a_slide_has_a_page_too() -> None:
    page = slide_page(SUMMARY, b"\x89PNG")
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert "10 tiles with tissue, 60% a" in page
    none = SUMMARY | {"labels": {"a": 0, "b": 0}, "abstained": 10}
    assert "10 tiles with tissue, no answer on any" in slide_page(none, b"")
    assert re.search(r"blurred</td><td class=\"number\">2<", page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 500])
def test_it_is_drawn_by_a_browser(
    evidence: Evidence, classifier: FewShotClassifier, tmp_path: Path, width: int
) -> None:
    page, shot = tmp_path / "card.html", tmp_path / "shot.png"
    page.write_text(tile_page(evidence, classifier), "utf-8")
    size, place = f"--window-size={width},1600", f"--screenshot={shot}"
    line = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", size, place]
    subprocess.run([*line, page.as_uri()], check=True, capture_output=True, timeout=120)
    drawn = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert drawn.shape[1] == width
    # The bar of the likeliest class is as long as its probability says, and on the screen.
    bar = np.abs(drawn - np.array([0, 114, 178])).sum(axis=2) < 10
    rows = np.flatnonzero(bar.sum(axis=1) > 40)
    chance = max(evidence.prediction.probabilities.values())
    assert len(rows)
    longest = bar[rows].sum(axis=1).max()
    track = longest / chance
    assert 0.3 * width < track < width
