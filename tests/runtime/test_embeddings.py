"""Embeddings and tables of answers, opened by their own ecosystems' readers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slide_maker import write_ome

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.cli import infer_command

anndata = pytest.importorskip("anndata")
parquet = pytest.importorskip("pyarrow.parquet")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    shell: Run, bundle_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.chdir(tmp_path)
    engine = ("--bundle", bundle_dir, "--backend", "onnxruntime")
    return lambda *words: shell(infer_command, *words, *engine)


@pytest.fixture
def tiles(phantom_dir: Path) -> list[Path]:
    return sorted((phantom_dir / "new_patient").glob("*.tif"))


def opened(path: Path) -> Any:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


@pytest.mark.parametrize("name", ["found.h5ad", "found.zarr"])
def test_tiles_have_their_embeddings_and_answers(
    run: Run, tiles: list[Path], bundle_dir: Path, tmp_path: Path, name: str
) -> None:
    odd = tmp_path / "odd.tif"
    odd.write_bytes(b"II*\0")
    for _ in range(2):  # the second replaces the first
        code, out, err = run("--no-ct", *tiles, odd, "--json", "--embeddings", name)
    assert code == 2
    assert f"embeddings: {name}" in err
    answers = [json.loads(line) for line in out.splitlines() if "label" in json.loads(line)]
    table = opened(tmp_path / name)
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime")
    np.testing.assert_allclose(table.X, classifier.embed(tiles), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(table.X, axis=1), 1, atol=1e-5)
    assert list(table.obs_names) == [one["tile"] for one in answers]
    assert list(table.obs["label"]) == [one["label"] or "" for one in answers]
    for label in classifier.classes:
        told = [one["probabilities"][label] for one in answers]
        np.testing.assert_allclose(table.obs[f"p_{label}"], told)
    assert table.uns["cdt_edge"]["ct"] == "not in the embeddings"
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {name, "odd.tif"}


def test_tiles_of_a_slide_have_places(
    run: Run, tiles: list[Path], tmp_path: Path, bundle_dir: Path
) -> None:
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime")
    preprocess = classifier.preprocess
    tile = classifier.read(tiles[0])
    side = preprocess.image_size
    pixels = np.tile(tile.array.transpose(1, 2, 0), (3, 4, 1)).astype(np.uint8)
    slide = write_ome(
        tmp_path / "slide.ome.tif", pixels, preprocess.channels, preprocess.tile_mpp, levels=1
    )
    words = ("--no-ct", slide, "--slide", "--embeddings", "slide.h5ad", "--parquet", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["files"][-1] == "tiles.parquet"
    table = anndata.read_h5ad("slide.h5ad")
    assert table.shape[0] == summary["tiles"] > 6
    rows, columns = table.obs["row"].to_numpy(), table.obs["column"].to_numpy()
    middles = np.stack([(columns + 0.5) * side, (rows + 0.5) * side], axis=1)
    np.testing.assert_allclose(table.obsm["spatial"], middles, rtol=1e-3)
    own = classifier.embed([tiles[0]])[0]
    assert float((table.X @ own).max()) > 0.99
    with Path("slide.cdt/tiles.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = parquet.read_table("slide.cdt/tiles.parquet").to_pylist()
    assert len(found) == len(lines)
    for ours, line in zip(found, lines, strict=True):
        assert (ours["row"], ours["column"]) == (int(line["row"]), int(line["column"]))
        assert ours["label"] == (line["label"] or None)
        assert ours["tissue"] == float(line["tissue"])


def test_a_cohort_is_a_table_with_types(run: Run, tiles: list[Path], tmp_path: Path) -> None:
    with Path("cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "ct_dir", "tiles"])
        writer.writerow(["007", "", str(tiles[0])])
        writer.writerow(["1e5", "", f"{tiles[1]};gone.tif"])
    code, out, _ = run("--manifest", "cohort.csv", "--parquet")
    assert code == 2
    assert "written   cohort.cdt: results.jsonl, answers.csv, answers.parquet" in out
    table = parquet.read_table("cohort.cdt/answers.parquet")
    assert table["patient"].to_pylist() == ["007", "1e5", "1e5"]
    assert table["row"].to_pylist() == [1, 2, 2]
    found = [json.loads(line) for line in Path("cohort.cdt/results.jsonl").read_text().splitlines()]
    chances = found[0]["tiles"][0]["probabilities"]
    for name, chance in chances.items():
        assert table[f"p_{name}"].to_pylist()[0] == chance
        assert table[f"p_{name}"].to_pylist()[2] is None
    assert table["error"].to_pylist()[:2] == [None, None]
    assert "gone.tif" in table["error"].to_pylist()[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--embeddings", "x.csv"), "--embeddings x.csv: expected a name in .h5ad or .zarr"),
        (("--embeddings", "no/x.h5ad"), "--embeddings no/x.h5ad: there is no such folder"),
        (("--parquet",), "--parquet is for --manifest and --slide"),
    ],
)
def test_what_can_not_be_written_is_one_line(
    run: Run, tiles: list[Path], words: tuple[str, ...], said: str
) -> None:
    code, out, err = run("--no-ct", tiles[0], *words)
    assert (code, out) == (2, "")
    assert said in err
