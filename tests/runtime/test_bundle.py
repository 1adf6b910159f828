from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cdt_runtime.bundle import MANIFEST, Bundle, newest_bundle, write_bundle
from cdt_runtime.errors import BundleError

FILES = {"a.onnx": b"graph", "b.json": b"{}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "small", FILES, {"precision": "fp32"}).path


def test_what_was_written_is_read(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.read("a.onnx") == b"graph"
    assert bundle.manifest["precision"] == "fp32"
    assert len(bundle.identity) == 12


def test_writing_again_replaces_the_whole_bundle(path: Path) -> None:
    write_bundle(path, {"c.json": b"new"}, {})
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "c.json"]
    assert [entry.name for entry in path.parent.iterdir()] == ["small"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle: give another --output"):
        write_bundle(tmp_path / "thesis", FILES, {})
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_flip_of_any_byte_is_refused(path: Path) -> None:
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(len(whole)):
            file.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            )
            with pytest.raises(BundleError):
                Bundle.open(path)
        file.write_bytes(whole)
    Bundle.open(path)


def test_an_altered_file_is_named(path: Path) -> None:
    (path / "a.onnx").write_bytes(b"graph?")
    with pytest.raises(BundleError, match=r"small/a\.onnx: altered since export"):
        Bundle.open(path)


def test_a_file_altered_after_opening_is_refused_too(path: Path) -> None:
    bundle = Bundle.open(path)
    (path / "a.onnx").write_bytes(b"grapf")
    with pytest.raises(BundleError, match="altered since export"):
        bundle.read("a.onnx")


def test_an_unlisted_file_is_refused(path: Path) -> None:
    (path / "a.onnx.data").write_bytes(b"external")
    with pytest.raises(BundleError, match=r"small/a\.onnx\.data: not in the manifest: remove it"):
        Bundle.open(path)


def test_plans_of_this_machine_are_let_be(path: Path) -> None:
    (path / "plans").mkdir()
    assert Bundle.open(path).manifest["precision"] == "fp32"


def test_a_missing_file_is_named(path: Path) -> None:
    (path / "b.json").unlink()
    with pytest.raises(BundleError, match=r"small/b\.json: missing: copy or export"):
        Bundle.open(path)


def test_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"graph")
    (path / "a.onnx").unlink()
    os.symlink(tmp_path / "elsewhere", path / "a.onnx")
    with pytest.raises(BundleError, match="a link or a path, not a file of the bundle"):
        Bundle.open(path)


def test_an_edited_manifest_is_refused(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["precision"] = "fp16"
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(BundleError, match=r"small/bundle\.json: altered since export"):
        Bundle.open(path)


def test_another_schema_is_refused(path: Path) -> None:
    (path / MANIFEST).write_text('{"schema": 99}')
    with pytest.raises(BundleError, match="schema 99, this version reads 1: export again"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON: export again"), ("[]", "schema None, this version reads 1")],
)
def test_a_broken_manifest_is_refused(path: Path, content: str, message: str) -> None:
    (path / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="gone: no such folder: give the folder that cdt-export"):
        Bundle.open(tmp_path / "gone")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        Bundle.open(tmp_path)


def test_an_unlisted_name_is_not_read(path: Path) -> None:
    with pytest.raises(BundleError, match=r"small: no c\.onnx in the manifest"):
        Bundle.open(path).read("c.onnx")


def test_the_newest_bundle_is_found(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle in .*: make one with cdt-train and cdt-expo"):
        newest_bundle(tmp_path)
    for age, name in ((20, "old"), (10, "new"), (30, "oldest")):
        made = write_bundle(tmp_path / name, FILES, {}).path / MANIFEST
        os.utime(made, ns=(10**18 - age, 10**18 - age))
    assert newest_bundle(tmp_path).name == "new"
