"""A cohort of generated patients in one process and on a Ray cluster of two actors.

    python benchmarks/cohort.py [--bundle DIR] [--patients 200]

Three runs of the same table: one process; Ray; Ray with one of its actors killed in the middle.
All three must name the one row that can't be used, and give the same bytes. Writes
`benchmarks/results/cohort.json`. Needs `pip install 'cdt-edge[ray]'`.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from records import write_result

from cdt_runtime.bundle import newest_bundle
from cdt_runtime.cohort import COLUMNS, GROWING, RESULTS, TABLE
from cdt_runtime.errors import InputError
from cdt_train.data.phantom import write_phantom

BAD_ROW = 7
FILES = (RESULTS, TABLE, "answers.parquet")


def write_table(folder: Path, patients: int) -> Path:
    """Generate patients with two tiles each, four of five with a CT of their own."""
    with_ct = patients * 4 // 5
    write_phantom(folder, seed=7, n_patients=patients, n_ct=with_ct, regions_per_class=1)
    scans = sorted((folder / "ct_data").iterdir())
    path = folder / "cohort.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, tiles in enumerate(sorted((folder / "pathology_data").glob("Patient_*"))):
            ct = scans[number].relative_to(folder) if number < with_ct else ""
            named = "gone.tif" if number == BAD_ROW else tiles.relative_to(folder)
            writer.writerow([tiles.name, ct, named, ""])
    return path


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


def run(table: Path, bundle: Path, folder: Path, *more: str, kill_after: int = 0) -> dict[str, Any]:
    """Run the command, with CT tokens of its own; kill an actor once so many rows are done."""
    script = "from cdt_runtime.cli import infer; infer()"
    words = ("--manifest", table, "--bundle", bundle, "--out", folder, "--backend", "onnxruntime")
    started, killed = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words), "--parquet", *more],
        env={**os.environ, "CDT_CACHE": str(folder.with_suffix(".cache"))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    first, growing = None, folder / GROWING
    while process.poll() is None:
        time.sleep(0.05)
        lines = growing.read_bytes().count(b"\n") if growing.exists() else 0
        first = first or (time.perf_counter() if lines else None)
        if kill_after and not killed and lines >= kill_after:
            killed = actors()[0]
            os.kill(killed, signal.SIGKILL)
    ended = time.perf_counter()
    said = process.communicate()[1]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    expected = f"error: row {BAD_ROW + 1}: gone.tif: no such file or folder"
    if process.returncode != InputError.exit_code or errors != [expected]:
        raise click.ClickException(f"exit code {process.returncode}: {said}")
    if bool(kill_after) != bool(killed):
        raise click.ClickException("the run was over before an actor could be killed")
    return {"seconds": ended - started, "from_first_row": ended - (first or started)}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: newest in ./engines]")
@click.option("--patients", default=200, show_default=True)
def main(bundle: Path | None, patients: int) -> None:
    """Run the three, compare and report."""
    started = time.perf_counter()
    bundle = bundle or newest_bundle(Path("engines"))
    found: dict[str, Any] = {"patients": patients}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_table(folder / "data", patients)
        found["one"] = run(table, bundle, folder / "one")
        found["ray"] = run(table, bundle, folder / "ray", "--ray")
        found["killed"] = run(table, bundle, folder / "killed", "--ray", kill_after=patients // 4)
        one = [(folder / "one" / file).read_bytes() for file in FILES]
        for other in ("ray", "killed"):
            same = [(folder / other / file).read_bytes() for file in FILES] == one
            found[other] |= {"same_bytes": same, "throughput": _ratio(found, other)}
    click.echo(json.dumps(found, indent=1))
    command = f"python benchmarks/cohort.py --patients {patients}"
    write_result("cohort", [command], time.perf_counter() - started, found)
    if not (found["ray"]["same_bytes"] and found["killed"]["same_bytes"]):
        raise click.ClickException("the results are not those of one process")


def _ratio(found: dict[str, Any], other: str) -> float:
    """Rows a second from the first row on, against one process."""
    return round(found["one"]["from_first_row"] / found[other]["from_first_row"], 3)


if __name__ == "__main__":
    main()
