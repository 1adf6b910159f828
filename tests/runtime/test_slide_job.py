"""`cdt-infer --slide`: whole slides and folders of tiles, as a user runs them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slide_maker import smooth_rgb, write_ome, write_svs

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.cli import infer_command
from cdt_runtime.errors import TileError
from cdt_runtime.progress import Progress
from cdt_runtime.reading import open_slide
from cdt_runtime.slides import job
from cdt_runtime.slides.job import GROWING, STATE, TABLE, classify_slide, plan_slide
from cdt_runtime.slides.table import BLANK, LOW
from cdt_runtime.tile import read_tile
from cdt_runtime.tile_folder import tiles_under

ROWS, COLUMNS, SIDE = 3, 5, 256
EMPTY = {(0, 0), (2, 4)}


@pytest.fixture(scope="module")
def tiles(phantom_dir: Path) -> list[Path]:
    return sorted((phantom_dir / "new_patient").glob("*.tif"))


@pytest.fixture(scope="module")
def slide(tiles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mosaic of the new patient's tiles, with two places of glass."""
    read = [read_tile(tile) for tile in tiles]
    mosaic = np.zeros((ROWS * SIDE, COLUMNS * SIDE, len(read[0].channels)), np.uint8)
    for row, column in shown():
        part = read[index_of(row, column, len(read))].pixels
        mosaic[row * SIDE :, column * SIDE :][:SIDE, :SIDE] = part
    path = tmp_path_factory.mktemp("slides") / "case 7.ome.tif"
    return write_ome(path, mosaic, read[0].channels, read[0].mpp, levels=1)


def shown() -> list[tuple[int, int]]:
    every = ((row, column) for row in range(ROWS) for column in range(COLUMNS))
    return [place for place in every if place not in EMPTY]


def index_of(row: int, column: int, count: int) -> int:
    return (row * COLUMNS + column) % count


@pytest.fixture
def infer(
    bundle_dir: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Callable[..., tuple[int, str, str]],
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        engine = ["--backend", "onnxruntime"]
        return shell(infer_command, *arguments, "--bundle", bundle_dir, *engine)

    return call


def open_classifier(bundle_dir: Path) -> FewShotClassifier:
    return FewShotClassifier.open(bundle_dir, backend="onnxruntime")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_slide_gets_the_answers_that_its_tiles_get_alone(
    infer: Callable[..., tuple[int, str, str]],
    slide: Path,
    tiles: list[Path],
    phantom_dir: Path,
    bundle_dir: Path,
    tmp_path: Path,
) -> None:
    ct = phantom_dir / "new_patient" / "ct"
    code, out, err = infer(ct, slide, "--slide", "--json")
    assert (code, err) == (0, "")
    folder = tmp_path / "case 7.cdt"
    table = rows_of(folder / TABLE)
    assert [(int(row["row"]), int(row["column"])) for row in table] == shown()
    classifier = open_classifier(bundle_dir)
    alone = classifier.predict(tiles, ct)
    for row in table:
        same = alone[index_of(int(row["row"]), int(row["column"]), len(tiles))]
        assert row["label"] == (same.label or "")
        for name, chance in same.probabilities.items():
            assert float(row[f"p_{name}"]) == pytest.approx(chance, abs=1e-4)
        assert (float(row["x"]), float(row["width"])) == (int(row["column"]) * 256, 256.0)
        assert float(row["y"]) == int(row["row"]) * 256
    summary = json.loads(out)
    assert sorted([*summary["files"], STATE]) == sorted(each.name for each in folder.iterdir())
    assert summary["labels"] == {
        name: sum(row["label"] == name for row in table) for name in classifier.classes
    }
    assert summary["abstained"] == sum(not row["label"] for row in table)
    assert (summary["tiles"], summary["grid"], summary["unreadable"]) == (13, [3, 5], 0)
    assert summary["tile_microns"] == 128.0
    heat = tifffile.imread(folder / "heatmap.ome.tif", level=0)
    for row in table:
        found = heat[:, int(row["row"]), int(row["column"])]
        if row["label"]:
            assert found[classifier.classes.index(row["label"])] == found.max()
        else:
            assert np.isnan(found).all()
    assert all(np.isnan(heat[:, row, column]).all() for row, column in EMPTY)


def test_the_summary_for_a_person(
    infer: Callable[..., tuple[int, str, str]], slide: Path, tmp_path: Path
) -> None:
    code, out, err = infer("--no-ct", slide, "--slide", "--out", "there")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "case 7.ome.tif: 13 of 15 tiles show tissue, 128 microns each"
    assert [line.split()[0] for line in lines[1:4]] == ["invasion_front", "tumor_stroma", "can't"]
    assert "written   there: tiles.csv, areas.geojson, heatmap.ome.tif, overview.png" in lines
    assert "CT        none: the tiles alone decide" in lines
    assert lines[-1] == "Research use only: not a medical device."


def test_the_levels_of_a_slide_are_used(
    bundle_dir: Path, tiles: list[Path], tmp_path: Path, cache_dir: Path
) -> None:
    tile = read_tile(tiles[0])
    pixels = np.tile(tile.pixels, (2, 2, 1))
    path = write_ome(tmp_path / "s.ome.tif", pixels, tile.channels, tile.mpp, levels=3)
    classifier = open_classifier(bundle_dir)
    found = classify_slide(classifier, path, classifier.context(None), tmp_path / "out")
    assert found.plan.grid.level.downsample == 4.0
    assert found.plan.grid.full_side == 256.0
    finer = classify_slide(classifier, path, classifier.context(None), tmp_path / "f", mpp=1.0)
    assert (finer.plan.grid.rows, finer.plan.grid.level.downsample) == (4, 2.0)
    assert finer.plan.warnings == ("--mpp 1, trained at 2.00",)


class Killed(BaseException):
    """As a signal ends the run."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """End a run before it asks for one more batch."""
    real, asked = FewShotClassifier.classify, [0]

    def classify(self: FewShotClassifier, *arguments: Any) -> Any:
        asked[0] += 1
        if asked[0] > batches:
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(FewShotClassifier, "classify", classify)


def test_a_killed_run_goes_on_and_gives_the_same_files(
    bundle_dir: Path, slide: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = open_classifier(bundle_dir)
    context = classifier.context(None)
    classify_slide(classifier, slide, context, tmp_path / "whole")
    monkeypatch.setattr(FewShotClassifier, "batch_size", 4)
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Killed):
            classify_slide(classifier, slide, context, tmp_path / "cut")
    growing = tmp_path / "cut" / GROWING
    assert len(growing.read_text().splitlines()) == 1 + 8
    with growing.open("a") as file:
        file.write("2,1,256.0,51")  # the line that was being written
    found = classify_slide(classifier, slide, context, tmp_path / "cut")
    assert (found.resumed, len(found.answers)) == (8, 13)
    same = [(tmp_path / name / TABLE).read_bytes() for name in ("whole", "cut")]
    assert same[0] == same[1]
    assert not growing.exists()
    stopped_after(monkeypatch, 0)  # all is known: nothing is asked
    again = classify_slide(classifier, slide, context, tmp_path / "cut")
    assert again.resumed == 13


def test_results_of_something_else_are_not_mixed(
    infer: Callable[..., tuple[int, str, str]], slide: Path, tmp_path: Path
) -> None:
    assert infer("--no-ct", slide, "--slide", "--out", "here")[0] == 0
    before = (tmp_path / "here" / TABLE).read_bytes()
    said = (
        "error: --out here: holds results of another slide, bundle, CT or scale: give another "
        "folder\n"
    )
    other = tmp_path / "other.ome.tif"
    shutil.copy(slide, other)
    changes = [("--no-ct", slide, "--mpp", "1.0"), ("--no-ct", other)]
    for change in changes:
        assert infer(*change, "--slide", "--out", "here") == (2, "", said)
    assert (tmp_path / "here" / TABLE).read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(
    infer: Callable[..., tuple[int, str, str]], slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / STATE).write_text("{broken")
    code, _, err = infer("--no-ct", slide, "--slide", "--out", "here")
    assert code == 2
    assert "--out here: holds results of another slide" in err
    job_state = tmp_path / "there"
    assert infer("--no-ct", slide, "--slide", "--out", "there")[0] == 0
    (job_state / TABLE).write_text("a,b\n1,2\n")
    code, _, err = infer("--no-ct", slide, "--slide", "--out", "there")
    assert (code, err) == (
        2,
        "error: tiles.csv in the output folder has other columns: give another --out\n",
    )


def test_a_damaged_part_costs_its_tiles_alone(
    infer: Callable[..., tuple[int, str, str]], slide: Path, tmp_path: Path
) -> None:
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as file:
        at = file.pages[2].dataoffsets[101]  # type: ignore[union-attr]
    data[at : at + 20] = b"\xff" * 20
    path = tmp_path / "hurt.ome.tif"
    path.write_bytes(data)
    code, out, err = infer("--no-ct", path, "--slide", "--out", "hurt")
    assert code == 2
    assert err.startswith("error: hurt.ome.tif: 1 tiles can't be read, the first: ")
    assert err.count("\n") == 1
    assert "    unreadable            1    7.7%" in out
    table = {(row["row"], row["column"]): row for row in rows_of(tmp_path / "hurt" / TABLE)}
    bad = table["1", "0"]
    assert (bad["label"], bad["p_tumor_stroma"]) == ("", "nan")
    assert bad["reason"].endswith("damaged")
    assert all(row["p_tumor_stroma"] != "nan" for place, row in table.items() if row is not bad)
    again = infer("--no-ct", path, "--slide", "--out", "hurt")
    assert again[0] == 2
    assert again[2] == err


def test_low_confidence_and_blank_tiles_are_told_apart(
    bundle_dir: Path, tiles: list[Path], tmp_path: Path, cache_dir: Path
) -> None:
    tile = read_tile(tiles[0])
    flat = np.full_like(tile.pixels, 30)
    pixels = np.concatenate([tile.pixels, flat, np.zeros_like(flat)], axis=1)
    path = write_ome(tmp_path / "s.ome.tif", pixels, tile.channels, tile.mpp, levels=1)
    classifier = open_classifier(bundle_dir)
    classifier.prototypes = _with_confidence(classifier, 1.1)
    found = classify_slide(classifier, path, classifier.context(None), tmp_path / "out")
    reasons = {one.column: (one.label, one.reason) for one in found.answers}
    assert reasons == {0: (None, LOW), 1: (None, BLANK)}


def _with_confidence(classifier: FewShotClassifier, least: float) -> Any:
    return replace(classifier.prototypes, min_confidence=least)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x"), "--out is for whole slides: add --slide, or redirect standard output"),
        (("--slide", "SLIDE"), "--slide with 2 files: give one slide at a time"),
        (("--slide", "--out", " "), "--out is empty: is a variable of your script unset?"),
    ],
)
def test_options_that_do_not_go_together(
    infer: Callable[..., tuple[int, str, str]], slide: Path, words: tuple[str, ...], said: str
) -> None:
    given = [slide if word == "SLIDE" else word for word in words]
    assert infer("--no-ct", slide, *given) == (2, "", f"error: {said}\n")


def test_slides_that_can_not_be_used(
    infer: Callable[..., tuple[int, str, str]], tiles: list[Path], tmp_path: Path
) -> None:
    tile = read_tile(tiles[0])
    part = write_ome(tmp_path / "part.ome.tif", tile.pixels[:100], tile.channels, tile.mpp)
    rgb = write_svs(tmp_path / "he.svs", smooth_rgb(600, 600), 0.5)
    (tmp_path / "x.svs").write_text("none")
    expected = {
        part: "part.ome.tif: shows 128 x 50 microns, a tile 128: classify it as a tile, without "
        "--slide",
        rgb: "he.svs: has the channels R, G, B, the model expects DAPI, ",
        tmp_path
        / "x.svs": "x.svs: is no slide in TIFF (OME-TIFF, SVS, tiled) or DICOM: convert it",
    }
    for path, said in expected.items():
        code, out, err = infer("--no-ct", path, "--slide")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {said}")
        assert err.count("\n") == 1
        assert not (tmp_path / f"{path.name.split('.')[0]}.cdt").exists()


def test_a_model_without_a_scale_needs_one(bundle_dir: Path, slide: Path) -> None:
    unscaled = replace(open_classifier(bundle_dir).preprocess, tile_mpp=None)
    said = (
        r"^case 7.ome.tif: the model does not know at what scale it was trained: give the microns "
        r"a pixel of its training tiles with --mpp$"
    )
    with open_slide(slide) as opened:
        with pytest.raises(TileError, match=said):
            plan_slide(opened, unscaled, mpp=None, fill_missing=False)
        plan = plan_slide(opened, unscaled, mpp=2.0, fill_missing=False)
    assert len(plan.places) == 13


def test_a_slide_without_a_scale_is_taken_at_that_of_the_model(
    bundle_dir: Path, tiles: list[Path], tmp_path: Path, cache_dir: Path
) -> None:
    tile = read_tile(tiles[0])
    path = write_ome(tmp_path / "s.ome.tif", tile.pixels, tile.channels, None, levels=1)
    classifier = open_classifier(bundle_dir)
    found = classify_slide(classifier, path, classifier.context(None), tmp_path / "out")
    assert found.plan.warnings == (
        "no resolution in the file: its finest level is taken to have 2",
    )
    assert (found.plan.grid.rows, found.plan.grid.columns) == (4, 4)


def test_without_tifffile_it_is_said_before_the_work(
    infer: Callable[..., tuple[int, str, str]],
    slide: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setattr(job, "open_slide", lambda *_: pytest.fail("the work has begun"))
    said = "needs tifffile, which is not installed: pip install 'cdt-edge[all]'"
    assert infer("--no-ct", slide, "--slide") == (2, "", f"error: this command {said}\n")
    assert not (tmp_path / "case 7.cdt").exists()


def test_a_folder_of_tiles_is_answered_tile_by_tile(
    infer: Callable[..., tuple[int, str, str]], phantom_dir: Path, tiles: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "tiles"
    (folder / "inner").mkdir(parents=True)
    for index, tile in enumerate(tiles):
        shutil.copy(tile, folder / ("inner" if index % 2 else "") / tile.name)
    (folder / "notes.txt").write_text("not a tile")
    code, out, err = infer("--no-ct", folder, "--json")
    assert (code, err) == (0, "")
    one_by_one = infer("--no-ct", *tiles, "--json")[1]
    found, alone = ([json.loads(line) for line in text.splitlines()] for text in (out, one_by_one))
    by_name = {Path(each["tile"]).name: each["probabilities"] for each in alone}
    assert {Path(each["tile"]).name for each in found} == set(by_name)
    for each in found:
        assert each["probabilities"] == pytest.approx(by_name[Path(each["tile"]).name], abs=1e-5)


def test_what_a_folder_stands_for(tmp_path: Path) -> None:
    names = ("DAPI", "CD3", "CD8")
    for each in ("a_DAPI.png", "a_CD3.png"):
        _touch(tmp_path / "one" / each)
    for each in ("x.png", "y.png", "deep/z.tif"):
        _touch(tmp_path / "many" / each)
    _touch(tmp_path / "many" / ".hidden" / "no.png")
    one, many = str(tmp_path / "one"), tmp_path / "many"
    assert tiles_under(one, names) == [one]
    assert tiles_under(str(many), names) == [
        str(many / "x.png"),
        str(many / "y.png"),
        str(many / "deep" / "z.tif"),
    ]
    assert tiles_under(str(many), ("A", "B"), ["A", "B"])[0] == str(many)
    (tmp_path / "empty").mkdir()
    assert tiles_under(str(tmp_path / "empty"), names) == [str(tmp_path / "empty")]
    assert tiles_under("gone.png", names) == ["gone.png"]


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_progress_says_how_far_how_fast_and_how_long() -> None:
    progress = Progress("tiles", 1000, done=200)
    progress.add(300)
    assert progress.line(10.0) == "tiles 500 of 1000 (50%), 30/s, 0:17 left"
    assert Progress("tiles", 10).line(0.0) == "tiles 0 of 10 (0%)"
    slow = Progress("tiles", 40000)
    slow.add(1)
    assert slow.line(1.0) == "tiles 1 of 40000 (0%), 1/s, 11:06:39 left"


def test_progress_shows_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress("tiles", 2)
    progress.add(2)
    progress.close()
    assert capsys.readouterr().err.endswith("left\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    silent = Progress("tiles", 2)
    silent.add(2)
    silent.close()
    assert capsys.readouterr().err == ""


def test_a_missing_output_folder_that_can_not_be_made(
    infer: Callable[..., tuple[int, str, str]], slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = infer("--no-ct", slide, "--slide", "--out", "file/inner")
    assert (code, out) == (2, "")
    assert err == "error: --out file/inner: can't be made (Not a directory): give another folder\n"
