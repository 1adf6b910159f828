"""Prototypes drawn towards the tiles that are about to be classified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cdt_runtime import FewShotClassifier
from cdt_runtime.cli import infer_command
from cdt_runtime.prototypes import fit_prototypes, transduced

Shell = Callable[..., tuple[int, str, str]]


def test_they_move_towards_the_tiles_of_their_class() -> None:
    rng = np.random.default_rng(0)
    middles = np.eye(2, 16, dtype=np.float32)

    def some(count: int, off: float) -> np.ndarray:
        tiles = middles.repeat(count, axis=0) + rng.normal(scale=off, size=(2 * count, 16))
        unit: np.ndarray = tiles / np.linalg.norm(tiles, axis=1, keepdims=True)
        return unit.astype(np.float32)

    support, labels = some(1, 0.2), np.array([0, 1])
    means = fit_prototypes(support, labels, 2)
    drawn = transduced(means, support, labels, some(40, 0.2), 4.0)
    assert np.linalg.norm(drawn, axis=1) == pytest.approx(1, abs=1e-5)
    before, after = (np.einsum("ke,ke->k", one, middles) for one in (means, drawn))
    assert (after > before).all()


def test_without_tiles_that_are_known_nothing_moves(bundle_dir: Path, cache_dir: Path) -> None:
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime")
    context = classifier.context(None)
    before = classifier.class_prototypes(context)
    shape = (64, 64, len(classifier.preprocess.channels))
    rng = np.random.default_rng(0)
    foreign = [classifier.read(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(3)]
    assert classifier.transduce(foreign, context) == 0
    assert np.array_equal(classifier.class_prototypes(context), before)


def test_it_is_asked_for(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    tiles = sorted((phantom_dir / "new_patient").glob("*.tif"))
    words = ("--no-ct", *tiles, "--bundle", bundle_dir, "--backend", "onnxruntime", "--json")
    plain = [json.loads(line) for line in shell(infer_command, *words)[1].splitlines()]
    code, out, err = shell(infer_command, *words, "--transductive")
    drawn = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert f"classes drawn towards {len(tiles)} tiles" in err
    assert [one["tile"] for one in drawn] == [one["tile"] for one in plain]
    assert [one["distances"] for one in drawn] != [one["distances"] for one in plain]
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0")
    code, out, err = shell(infer_command, *words, broken, "--transductive")
    assert code == 2
    assert "broken.tif" in err
    assert len(out.splitlines()) == len(tiles) + 1
    code, _, err = shell(infer_command, *words, "--transductive", "--coverage", "0.9")
    assert code == 2
    assert "not with --transductive" in err
