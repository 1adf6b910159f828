from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fuzzing import rehashed

from cdt_runtime.bundle import GRAPHS, MANIFEST, Bundle, newest_bundle, write_bundle
from cdt_runtime.errors import BundleError
from cdt_runtime.preprocess import Preprocess

FILES = {f"{name}.onnx": b"graph of " + name.encode() for name in GRAPHS}
FACTS = {
    "precision": "fp32",
    "graphs": {name: {} for name in GRAPHS},
    "preprocess": {},
    "training": {"data": "none"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "small", FILES, FACTS).path


def test_what_was_written_is_read(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.read("head.onnx") == b"graph of head"
    assert bundle.manifest["precision"] == "fp32"
    assert len(bundle.identity) == 12


def test_writing_again_replaces_the_whole_bundle(path: Path) -> None:
    write_bundle(path, {**FILES, "c.json": b"new"}, FACTS)
    assert {entry.name for entry in path.iterdir()} == {MANIFEST, "c.json", *FILES}
    assert Bundle.open(path).read("c.json") == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["small"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle: give another --output"):
        write_bundle(tmp_path / "thesis", FILES, FACTS)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_flip_of_any_byte_is_refused(path: Path) -> None:
    for file in (path / "head.onnx", path / MANIFEST):
        whole = file.read_bytes()
        for position in range(0, len(whole), 3):
            file.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            )
            with pytest.raises(BundleError):
                Bundle.open(path)
        file.write_bytes(whole)
    Bundle.open(path)


def test_an_altered_file_is_named(path: Path) -> None:
    (path / "head.onnx").write_bytes(b"graph?")
    with pytest.raises(BundleError, match=r"small/head\.onnx: altered since export"):
        Bundle.open(path)


def test_a_file_altered_after_opening_is_refused_too(path: Path) -> None:
    bundle = Bundle.open(path)
    (path / "head.onnx").write_bytes(b"graph of heaf")
    with pytest.raises(BundleError, match="altered since export"):
        bundle.read("head.onnx")


def test_an_unlisted_file_is_refused(path: Path) -> None:
    (path / "head.onnx.data").write_bytes(b"external")
    with pytest.raises(BundleError, match=r"small/head\.onnx\.data: not in the manifest: remo"):
        Bundle.open(path)


def test_a_folder_beside_the_files_is_refused(path: Path) -> None:
    (path / "plans").mkdir()
    with pytest.raises(BundleError, match=r"small/plans: not in the manifest: remove it"):
        Bundle.open(path)


def test_a_missing_file_is_named(path: Path) -> None:
    (path / "bridge.onnx").unlink()
    with pytest.raises(BundleError, match=r"small/bridge\.onnx: missing: copy or export"):
        Bundle.open(path)


def test_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"graph of head")
    (path / "head.onnx").unlink()
    os.symlink(tmp_path / "elsewhere", path / "head.onnx")
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
    with pytest.raises(BundleError, match="schema 99, this version reads 2: export again"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON: export again"), ("[]", "schema None, this version reads 2")],
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
        made = write_bundle(tmp_path / name, FILES, FACTS).path / MANIFEST
        os.utime(made, ns=(10**18 - age, 10**18 - age))
    assert newest_bundle(tmp_path).name == "new"


def test_an_export_that_was_killed_is_no_bundle(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "good", FILES, FACTS).path
    shutil.copytree(made, tmp_path / ".good.abc.partial")
    os.utime(tmp_path / ".good.abc.partial" / MANIFEST, ns=(2**62, 2**62))
    assert newest_bundle(tmp_path).name == "good"
    write_bundle(tmp_path / "good", FILES, FACTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_write_leaves_the_old_bundle(
    path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_bundle(path, {**FILES, "c.json": b"old"}, FACTS)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(path, FILES, FACTS)
    monkeypatch.undo()
    assert Bundle.open(path).read("c.json") == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["small"]


def test_a_system_without_exchange_replaces_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    write_bundle(path, {**FILES, "c.json": b"new"}, FACTS)
    assert Bundle.open(path).read("c.json") == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("key", ["files", "graphs", "preprocess", "training", "precision"])
def test_a_manifest_that_lacks_a_part_is_refused(tmp_path: Path, key: str) -> None:
    facts = {name: value for name, value in FACTS.items() if name != key}
    files = {} if key == "files" else FILES
    with pytest.raises(BundleError, match=rf"bundle\.json: lacks {key}\b.*: export again with"):
        write_bundle(tmp_path / "small", files, facts)


def test_a_manifest_of_endless_brackets_is_refused(path: Path) -> None:
    (path / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(BundleError, match="not valid JSON: export again"):
        Bundle.open(path)


def test_a_bundle_that_cannot_be_read_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BundleError, match=r"small: can't be read \(Permission denied\)"):
        Bundle.open(path)


def forged(path: Path, *place: str, value: object) -> None:
    """Put a value into a manifest and make all hashes right again, as no friend would."""
    manifest = json.loads((path / MANIFEST).read_text())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (path / MANIFEST).write_bytes(rehashed(manifest))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("files", "head.onnx"), {"sha256": "0"}, r"lacks files\.head\.onnx: export again"),
        (("files", "head.onnx"), {"bytes": 1}, r"lacks files\.head\.onnx: export again"),
        (("files", "head.onnx"), 0, r"lacks files\.head\.onnx: export again"),
        (("files", "a\nb"), {"bytes": 1, "sha256": "0"}, "lacks files.a.b: export again"),
        (("files", "../x"), {"bytes": 1, "sha256": "0"}, r"\.\./x: a link or a path, not a file"),
        (("files",), [], "lacks files"),
        (("graphs", "head"), [], r"lacks graphs\.head"),
        (("graphs", "tail"), {}, r"lacks graphs\.tail: no such graph"),
        (("training",), {"data": 3}, r"lacks training\.data"),
        (("encoders",), {"a": 1}, "lacks encoders"),
        (("path_encoder",), [1], "lacks path_encoder"),
        (("name",), "\ud800", "altered since export"),
        (("schema",), ["x" * 500], r"schema \['x{18}, this version reads 2"),
    ],
)
def test_a_forged_manifest_is_refused(
    path: Path, place: tuple[str, ...], value: object, said: str
) -> None:
    forged(path, *place, value=value)
    with pytest.raises(BundleError, match=said) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hu_windows", [{}], r"hu_windows is '\{\}', expected tuple"),
        ("hu_windows", [[]], r"hu_windows is '\[\]', expected tuple"),
        ("hu_windows", [[0, None]], "hu_windows is 'None', expected float"),
        ("hu_windows", [[5, 5]], "hu_windows are none or empty"),
        ("channels", "RGB", "channels is 'RGB', expected tuple"),
        ("channels", ["R", "R"], "channels are none or named twice"),
        ("image_size", True, "image_size is 'True', expected int"),
        ("image_size", -1, "image_size is -1, expected 1 to 4096"),
        ("slice_size", 10**9, "slice_size is 1000000000, expected 1 to 4096"),
        ("tile_dtype", "int4", "tile_dtype is 'int4', expected one of uint8, float32"),
        ("tile_mpp", {}, r"tile_mpp is '\{\}', expected float"),
        ("tile_mpp", -0.5, r"tile_mpp is -0\.5, expected above 0"),
        ("blank_std", float("inf"), "blank_std is 'inf', expected float"),
    ],
)
def test_a_forged_preprocessing_is_refused(key: str, value: object, said: str) -> None:
    values = {**Preprocess(("R", "G", "B")).to_dict(), key: value}
    with pytest.raises(BundleError, match=f"^preprocessing spec.*{said}"):
        Preprocess.from_dict(values)


def test_a_shape_that_is_none_is_refused(path: Path) -> None:
    with pytest.raises(BundleError, match=r"small/bundle\.json: no shape of head's logits"):
        Bundle.open(path).output_shape("head", "logits")
    for shape in ([], [1], [1, "n"], [1, -2], [1, 2**31], 7):
        forged(path, "graphs", "head", value={"outputs": {"logits": {"shape": shape}}})
        with pytest.raises(BundleError, match="no shape of head's logits"):
            Bundle.open(path).output_shape("head", "logits")
    forged(path, "graphs", "head", value={"outputs": {"logits": {"shape": [1, 4]}}})
    assert Bundle.open(path).output_shape("head", "logits") == (4,)
