"""A log whose lines hang on one another: what was changed shows, and no name is in it."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cdt_runtime.audit import FIRST, AuditLog, verify
from cdt_runtime.cli import infer_command
from cdt_runtime.doctor_cli import audit_command, doctor
from cdt_runtime.errors import InputError

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    made = AuditLog(path)
    for number in range(5):
        made.append({"input": f"{number:064x}", "label": "ä"})
    return path


def test_lines_follow_each_other(log: Path) -> None:
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [line["entry"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["previous"] for line in lines] == [FIRST, *(one["hash"] for one in lines[:-1])]
    assert verify(log).entries == 5
    assert verify(log).last == lines[-1]["hash"]


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a value": (lambda x: [*x[:2], x[2].replace(b"label", b"labul"), *x[3:]], "line 3: was"),
    "a line taken out": (lambda x: [*x[:2], *x[3:]], "line 3: does not follow"),
    "the first taken out": (lambda x: x[1:], "line 1: does not follow"),
    "two swapped": (lambda x: [x[0], x[2], x[1], *x[3:]], "line 2: does not follow"),
    "one put in twice": (lambda x: [*x[:2], x[1], *x[2:]], "line 3: does not follow"),
    "a torn end": (lambda x: [*x[:4], x[4][:-9]], "line 5: is torn"),
    "rubbish": (lambda x: [*x, b"[]\n"], "line 6: is no entry"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named(log: Path, change: str) -> None:
    make, words = CHANGES[change]
    log.write_bytes(b"".join(make(log.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match=rf"audit\.jsonl {words}"):
        verify(log)


def test_every_single_byte_counts(log: Path) -> None:
    whole = log.read_bytes()
    for place in range(0, len(whole), 7):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"audit\.jsonl line"):
            verify(log)


def test_a_torn_log_is_not_gone_on_with(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-5])
    before = log.read_bytes()
    with pytest.raises(InputError, match="last line is torn or no entry"):
        AuditLog(log)
    assert log.read_bytes() == before


def _write(path: Path) -> None:
    for _ in range(20):
        AuditLog(path).append({"input": "x"})


def test_several_processes_write_one_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path,)) for _ in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0, 0, 0]
    assert verify(path).entries == 60


def test_answers_and_failures_are_logged_without_names(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    patient, path = phantom_dir / "new_patient", tmp_path / "audit.jsonl"
    tiles = sorted(patient.glob("*.tif"))[:2]
    broken = tmp_path / "Muster_Anna.tif"
    broken.write_bytes(b"II*\0")
    words = (patient / "ct", *tiles, broken, "--bundle", bundle_dir, "--backend", "onnxruntime")
    code, out, _ = shell(infer_command, *words, "--json", "--audit", path)
    assert code == 2
    said = [json.loads(line) for line in out.splitlines()]
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [one["input"] for one in entries] == [said[0]["sha256"], said[1]["sha256"], None]
    assert [one.get("label") for one in entries[:2]] == [one["label"] for one in said[:2]]
    assert entries[2]["error"] == "TileError"
    assert len({one["ct"] for one in entries}) == 1
    text = path.read_text("utf-8")
    for name in ("Muster", "PHANTOM", "NEW_PATIENT", *(tile.stem for tile in tiles)):
        assert name not in text
    code, out, _ = shell(audit_command, path)
    assert code == 0
    assert out.startswith("3 entries, each follows from those before; last ")
    path.write_text(text.replace('"entry": 2', '"entry": 9'), "utf-8")
    code, out, err = shell(audit_command, path, "--json")
    assert (code, out) == (2, "")
    assert "line 2: does not follow" in err


def test_a_log_that_cannot_be_written_stops_before_the_work(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    tile = sorted((phantom_dir / "new_patient").glob("*.tif"))[0]
    words = ("--no-ct", tile, "--bundle", bundle_dir, "--audit", tmp_path / "no" / "log")
    code, out, err = shell(infer_command, *words)
    assert (code, out) == (2, "")
    assert "can't be written (No such file or directory): give another file" in err


def test_the_doctor_knows_the_word(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cdt-doctor", "audit", str(log)])
    with pytest.raises(SystemExit) as ended:
        doctor()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("5 entries")
