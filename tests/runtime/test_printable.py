from __future__ import annotations

from pathlib import Path

import pytest

from cdt_runtime.printable import counted, last_part, printable


def test_a_name_is_one_line() -> None:
    assert printable("a\nb\x1b[1m\udcff\u202e.dcm") == "a?b?[1m??.dcm"
    assert printable("C\x00D3", instead="") == "CD3"
    assert printable("x" * 300, most=5) == "xxxxx"


def test_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert last_part(Path("a/b.tif")) == "b.tif"
    assert last_part(Path(".")) == "here"
    (tmp_path / "here").rmdir()
    assert last_part(Path(".")) == "."
    assert last_part(Path("/")) == "/"


def test_counted() -> None:
    assert counted(1, "slice") == "1 slice"
    assert counted(2, "file of another modality") == "2 files of another modality"
