"""`cdt-enroll`: classes from a few tiles, in a bundle whose graphs stay as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdt_runtime import FewShotClassifier
from cdt_runtime.bundle import Bundle, sha256
from cdt_runtime.enroll import adding, listed_tiles, undo, write_change
from cdt_runtime.enroll_cli import enroll_command
from cdt_runtime.errors import BundleError, InputError, PrototypeError
from cdt_runtime.prototypes import FACTS, TENSORS

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path, cache_dir: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "engines" / "own"))


@pytest.fixture
def tiles(phantom_dir: Path) -> list[Path]:
    return sorted((phantom_dir / "new_patient").glob("*.tif"))


def graphs(bundle: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (sha256(path.read_bytes()), path.stat().st_mtime_ns)
        for path in bundle.glob("*.onnx")
    }


def enroll(shell: Shell, bundle: Path, *words: object) -> Any:
    line = ("--bundle", bundle, "--backend", "onnxruntime", "--json")
    code, out, err = shell(enroll_command, *words, *line)
    assert code == 0, err
    return json.loads(out)


def test_a_class_is_enrolled_answers_and_is_taken_back(
    shell: Shell, bundle: Path, tiles: list[Path]
) -> None:
    first, before = Bundle.open(bundle), graphs(bundle)
    found = enroll(shell, bundle, "--class", "front  line", tiles[0], tiles[1])
    assert found["tiles"]["front line"] == 2
    assert found["written"]
    assert graphs(bundle) == before  # neither changed nor written anew
    opened = FewShotClassifier.open(bundle, backend="onnxruntime")
    assert opened.classes[-1] == "front line"
    (answer,) = opened.predict([tiles[0]])
    assert answer.nearest == "front line"
    assert set(answer.probabilities) == set(opened.classes)
    found = enroll(shell, bundle, "--class", "front line", tiles[2])
    assert found["tiles"]["front line"] == 3
    found = enroll(shell, bundle, "--remove", "front line")
    assert "front line" not in found["tiles"]
    found = enroll(shell, bundle, "--list")
    assert [one["version"] for one in found["versions"]] == [1, 2, 3, 4]
    assert found["versions"][1]["what"] == "added 2 tiles to front line"
    for left in (3, 2, 1):
        assert len(enroll(shell, bundle, "--undo")["versions"]) == left
    back = Bundle.open(bundle)
    assert back.manifest == first.manifest
    with pytest.raises(PrototypeError, match="nothing to undo: it is as cdt-export wrote it"):
        undo(back)


def test_enrolled_prototypes_are_those_of_the_library(bundle: Path, tiles: list[Path]) -> None:
    """As many tiles of as many classes, enrolled or fitted, decide alike."""
    opened = FewShotClassifier.open(bundle, backend="onnxruntime")
    change = adding(opened, [(str(tile), "new") for tile in tiles[:2]])
    write_change(opened.bundle, change)
    enrolled = FewShotClassifier.open(bundle, backend="onnxruntime")
    context = enrolled.context(None)
    expected = enrolled.class_prototypes(context)[-1]
    fitted = FewShotClassifier.open(bundle, backend="onnxruntime")
    fitted.fit([*tiles[:2], tiles[2]], ["new", "new", "other"])
    if fitted.prototypes.fit == "mean":
        assert fitted.class_prototypes(context)[0] == pytest.approx(expected, abs=1e-5)


def test_a_dry_run_tells_and_writes_nothing(shell: Shell, bundle: Path, tiles: list[Path]) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    found = enroll(shell, bundle, "--class", "new", *tiles[:2], "--dry-run")
    assert not found["written"]
    assert found["left_out_tiles"] == sum(found["tiles"].values())
    assert 0 <= found["left_out_accuracy"] <= 1
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    code, out, _ = shell(
        enroll_command, "--class", "new", tiles[0], "--dry-run", "--bundle", bundle
    )
    assert code == 0
    assert "new" in out
    assert "dry run, nothing written   added 1 tile to new" in out
    assert "accuracy on each tile when it is left out: " in out


def test_many_classes_at_once_from_a_folder_or_a_table(
    shell: Shell, bundle: Path, tiles: list[Path], tmp_path: Path
) -> None:
    for index, tile in enumerate(tiles[:3]):
        folder = tmp_path / "tree" / ("one" if index < 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tile, folder)
    found = enroll(shell, bundle, "--from", tmp_path / "tree", "--dry-run")
    assert (found["tiles"]["one"], found["tiles"]["two"]) == (2, 1)
    table = tmp_path / "tiles.csv"
    rows = [f"tree/one/{tiles[0].name},one", f"tree/two/{tiles[2].name},two"]
    table.write_text("\n".join(["path,label", *rows]))
    found = enroll(shell, bundle, "--from", table)
    assert (found["tiles"]["one"], found["tiles"]["two"]) == (1, 1)
    table.write_text("path,label\nx.tif,\n")
    with pytest.raises(InputError, match=r"tiles\.csv line 2: expected the columns path,label"):
        listed_tiles(table, ())
    table.write_text("path,label\n")
    with pytest.raises(InputError, match=r"no tiles: expected folders CLASS/\*, or a CSV"):
        listed_tiles(table, ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ((), "give one of --class NAME TILE"),
        (("--class", "x"), "give one of --class NAME TILE"),
        (("--list", "--undo"), "give one of --class NAME TILE"),
        (("--undo", "--dry-run"), "--list shows the version that it goes back to"),
        (("--remove", "nothing"), "class 'nothing': unknown: the classes are"),
        (("--class", "x", "nowhere.tif"), "nowhere.tif"),
    ],
)
def test_what_can_not_be_done_is_said_and_changes_nothing(
    shell: Shell, bundle: Path, line: tuple[str, ...], reason: str
) -> None:
    before = Bundle.open(bundle).identity
    code, _, err = shell(enroll_command, *line, "--bundle", bundle, "--backend", "onnxruntime")
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1
    assert Bundle.open(bundle).identity == before


def test_one_bad_tile_of_many_changes_nothing(
    shell: Shell, bundle: Path, tiles: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no tile")
    before = Bundle.open(bundle).identity
    words = ("--class", "new", tiles[0], tmp_path / "bad.tif", "--bundle", bundle)
    code, _, err = shell(enroll_command, *words, "--backend", "onnxruntime")
    assert (code, "bad.tif" in err) == (2, True)
    assert Bundle.open(bundle).identity == before


def test_two_at_once_do_not_lose_a_change(bundle: Path, tiles: list[Path]) -> None:
    first, second = (FewShotClassifier.open(bundle, backend="onnxruntime") for _ in range(2))
    write_change(first.bundle, adding(first, [(str(tiles[0]), "one")]))
    change = adding(second, [(str(tiles[1]), "two")])
    with pytest.raises(BundleError, match="was changed by another command: give yours again"):
        write_change(second.bundle, change)
    assert FewShotClassifier.open(bundle, backend="onnxruntime").classes[-1] == "one"


def test_an_engine_is_not_tested_again_for_a_new_class(
    bundle: Path, tiles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FewShotClassifier.open(bundle)
    write_change(opened.bundle, adding(opened, [(str(tiles[0]), "one")]))
    monkeypatch.setattr("cdt_runtime.proof.self_test", lambda *_: pytest.fail("tested again"))
    assert FewShotClassifier.open(bundle).backend == opened.backend


def test_damage_to_an_older_version_is_found(bundle: Path, tiles: list[Path]) -> None:
    opened = FewShotClassifier.open(bundle, backend="onnxruntime")
    write_change(opened.bundle, adding(opened, [(str(tiles[0]), "one")]))
    names = {path.name for path in bundle.glob("prototypes*")}
    assert names == {TENSORS, FACTS, "prototypes-0001.safetensors", "prototypes-0001.json"}
    older = bundle / "prototypes-0001.json"
    content = older.read_bytes()
    older.unlink()
    older.write_bytes(content[:-1] + b" ")
    with pytest.raises(BundleError, match=r"prototypes-0001\.json: altered since export"):
        Bundle.open(bundle)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_bundle_that_may_not_be_written_says_so(bundle: Path, tiles: list[Path]) -> None:
    opened = FewShotClassifier.open(bundle, backend="onnxruntime")
    change = adding(opened, [(str(tiles[0]), "one")])
    bundle.parent.chmod(0o555)
    try:
        with pytest.raises(BundleError, match=r"can't be changed .*: check who may write there"):
            write_change(opened.bundle, change)
    finally:
        bundle.parent.chmod(0o755)
