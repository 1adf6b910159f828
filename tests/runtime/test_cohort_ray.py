"""Rows on a Ray cluster of two actors: the bytes of one process, also where an actor is killed.

By hand: needs `pip install 'cdt-edge[ray]'`.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdt_runtime.cohort import COLUMNS

pytest.importorskip("ray")

ROWS = 40


@pytest.fixture(scope="module")
def table(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = phantom_dir / "new_patient"
    tiles = sorted(source.glob("*.tif"))
    path = tmp_path_factory.mktemp("cohort") / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(ROWS):
            some = ";".join(str(tiles[(number + step) % len(tiles)]) for step in range(2))
            ct = str(source / "ct") if number % 2 else ""
            writer.writerow([f"P{number}", ct, "gone.tif" if number == 7 else some, ""])
    return path


def command(table: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    script = "from cdt_runtime.cli import infer; infer()"
    words = ("--manifest", table, "--bundle", bundle, "--backend", "onnxruntime", "--out", out)
    return [sys.executable, "-c", script, *map(str, words), *more]


def actors() -> list[int]:
    """The processes that hold the model."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::MapWorker"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed"])
def test_the_same_bytes_as_one_process(
    table: Path, bundle_dir: Path, tmp_path: Path, cache_dir: Path, killed: bool
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    done = subprocess.run(command(table, bundle_dir, one), capture_output=True, text=True)
    assert done.returncode == 2
    run = subprocess.Popen(
        command(table, bundle_dir, many, "--ray", "local"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    growing = many / "results.partial.jsonl"
    if killed:
        while run.poll() is None and not (
            growing.exists() and growing.read_bytes().count(b"\n") > 3
        ):
            time.sleep(0.05)
        os.kill(actors()[0], signal.SIGKILL)
    out, err = run.communicate(timeout=400)
    assert run.returncode == 2, err
    assert err.endswith("error: row 8: gone.tif: no such file or folder\n")
    assert err.count("error: ") == 1
    assert out.splitlines()[0] == done.stdout.splitlines()[0]
    for name in ("results.jsonl", "answers.csv", "cohort.json"):
        assert (many / name).read_bytes() == (one / name).read_bytes()
