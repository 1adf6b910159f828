"""A table of patients: the same answers as one by one, kept row by row."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdt_runtime import cohort
from cdt_runtime.audit import verify
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.cli import infer_command
from cdt_runtime.cohort import read_manifest
from cdt_runtime.errors import InputError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    shell: Run, bundle_dir: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.chdir(tmp_path)
    engine = ("--bundle", bundle_dir, "--backend", "onnxruntime")
    return lambda *words: shell(infer_command, *words, *engine)


@pytest.fixture
def patients(phantom_dir: Path, tmp_path: Path) -> Path:
    """Two patients with the same CT, one without, one whose tile is none, one without a CT_DIR."""
    data = tmp_path / "data"
    source = phantom_dir / "new_patient"
    tiles = sorted(source.glob("*.tif"))
    for name, some in (("A", tiles[:2]), ("B", tiles[2:4]), ("C", tiles[4:5])):
        (data / name).mkdir(parents=True)
        for tile in some:
            shutil.copy(tile, data / name)
    shutil.copytree(source / "ct", data / "ct")
    (data / "C" / "odd.tif").write_bytes(b"II*\0")
    rows = [
        ("A", "ct", "A", ""),
        ("B", "ct", f"B/{tiles[2].name}; B/{tiles[3].name}", ""),
        ("C", "", "C", ""),
        ("D", "gone", f"A/{tiles[0].name}", ""),
    ]
    return write(data / "cohort.csv", rows)


def write(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([cohort.COLUMNS, *rows])
    return path


def results(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "results.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_answers_are_those_of_one_by_one(run: Run, patients: Path) -> None:
    code, out, err = run("--manifest", patients)
    assert code == 2
    assert "4 rows, 2 of them with something that could not be used" in out
    assert err.splitlines() == [
        "error: row 3: odd.tif: the TIFF header lies at bytes 4 to 8 of a file of 4: the file is "
        "truncated or damaged; write the file again, or fetch it again",
        "error: row 4: gone: no such folder: give the folder that holds the CT series",
    ]
    found = results(Path("cohort.cdt"))
    assert [(row["row"], row["patient"]) for row in found] == list(
        zip((1, 2, 3, 4), "ABCD", strict=True)
    )
    home = patients.parent
    alone = run(home / "ct", home / "A", "--json")[1].splitlines()
    for line, record in zip(map(json.loads, alone), found[0]["tiles"], strict=True):
        line.pop("timings_ms")
        line["ct"].pop("cache_hit")
        assert record == line
    assert found[3]["error"].startswith("gone: no such folder")
    lines = list(csv.DictReader(Path("cohort.cdt/answers.csv").read_text("utf-8").splitlines()))
    assert [line["row"] for line in lines] == ["1", "1", "2", "2", "3", "3", "4"]
    assert lines[0]["label"] == (found[0]["tiles"][0]["label"] or "")
    assert sorted(path.name for path in Path("cohort.cdt").iterdir()) == [
        "answers.csv",
        "cohort.json",
        "results.jsonl",
    ]


def test_a_ct_is_encoded_once_a_patient(
    run: Run, patients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    whole = FewShotClassifier._encode_ct

    def counted(self: FewShotClassifier, inputs: Any) -> Any:
        encoded.append(1)
        return whole(self, inputs)

    monkeypatch.setattr(FewShotClassifier, "_encode_ct", counted)
    run("--manifest", patients)
    assert len(encoded) == 1


def test_a_stopped_run_goes_on_with_the_same_bytes(
    run: Run, patients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--manifest", patients, "--out", "whole")
    expected = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    real, asked = cohort.classify_row, []

    def stopping(*words: Any) -> dict[str, Any]:
        asked.append(words[1].number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(cohort, "classify_row", stopping)
    assert run("--manifest", patients, "--out", "part")[0] != 0
    growing = Path("part/results.partial.jsonl")
    growing.write_bytes(growing.read_bytes() + b'{"row": 3, "torn')
    monkeypatch.setattr(
        cohort, "classify_row", lambda *words: asked.append(words[1].number) or real(*words)
    )
    run("--manifest", patients, "--out", "part")
    assert asked == [1, 2, 3, 3, 4]
    assert {path.name: path.read_bytes() for path in Path("part").iterdir()} == expected


def test_rows_that_failed_are_tried_again_and_others_are_not(
    run: Run, patients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--manifest", patients)[0] == 2
    home = patients.parent
    shutil.copytree(home / "ct", home / "gone")
    (home / "C" / "odd.tif").unlink()
    asked: list[int] = []
    real = cohort.classify_row
    monkeypatch.setattr(
        cohort, "classify_row", lambda *words: asked.append(words[1].number) or real(*words)
    )
    code, out, err = run("--manifest", patients, "--json")
    assert (code, err, asked) == (0, "", [3, 4])
    assert json.loads(out)["failed_rows"] == []


def test_a_slide_and_the_log(run: Run, patients: Path, phantom_dir: Path, tmp_path: Path) -> None:
    tile = sorted((phantom_dir / "new_patient").glob("*.tif"))[0]
    table = write(tmp_path / "t.csv", [("A", "", "", str(tile)), ("A", "", str(tile), "")])
    code, out, err = run("--manifest", table, "--json", "--audit", "log.jsonl")
    assert (code, err) == (0, "")
    assert json.loads(out)["slides"] == 1
    slide = results(Path("t.cdt"))[0]["slide"]
    assert (Path("t.cdt") / slide["out"] / "areas.geojson").is_file()
    assert verify(Path("log.jsonl")).entries == 2
    before = Path("t.cdt/results.jsonl").read_bytes()
    run("--manifest", table)
    assert Path("t.cdt/results.jsonl").read_bytes() == before


def test_another_bundle_or_option_needs_another_folder(run: Run, patients: Path) -> None:
    run("--manifest", patients)
    code, _, err = run("--manifest", patients, "--no-ct")
    assert code == 2
    assert "--out cohort.cdt: holds results of another bundle, engine or options" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"columns \(none\): expected patient, tiles or slide"),
        ("patient,ct_dir\nA,ct\n", "columns ct_dir, patient: expected patient, tiles or slide"),
        ("patient,tiles,note\nA,b,c\n", "columns note, patient, tiles: expected"),
        ("patient,tiles\n", "0 rows, expected 1 to 1000000"),
        ("patient,tiles\n,b\n", "row 1: expected a patient, and tiles or a slide"),
        ("patient,tiles,slide\nA,b,c\n", "row 1: expected a patient, and tiles or a slide"),
        ("patient,tiles\nA,b\nB\n", "row 2: has more or fewer cells than names"),
        ("patient,tiles\nA,b,c\n", "row 1: has more or fewer cells than names"),
        ('patient,tiles\nA,"b\n', "is no CSV"),
        (b"patient,tiles\nA,\xff\n", "is not UTF-8 text"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"^--manifest t\.csv.*{said}"):
        read_manifest(path)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read \\(No such file or directory\\)"):
        read_manifest(tmp_path / "gone.csv")


@pytest.mark.parametrize("word", ["--slide", "--transductive", "a.tif"])
def test_what_names_inputs_too_is_refused(run: Run, patients: Path, word: str) -> None:
    code, _, err = run("--manifest", patients, word)
    assert code == 2
    assert "--manifest names the inputs of each patient: not with" in err
