"""How fast the runtime is, and how far from the limits: `python benchmarks/latency.py`.

Every engine that is here runs the same graphs with the same inputs, in turns, and must give the
same answers. Prints tables, and writes `benchmarks/results/latency-NAME.json` and a chart beside
it. Times hold for one machine at one moment; the ratios are what carries over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import latency_parts
import latency_report
import latency_slides
import numpy as np
from records import RESULTS, ROOT, machine, write_result

SCENARIOS = {
    "engines": latency_parts.engines,
    "single_stream": latency_parts.single_stream,
    "offline": latency_parts.offline,
    "ct": latency_parts.ct_series,
    "cold_start": latency_parts.cold_start,
    "slide": latency_slides.slide,
}
TOUCHED = (
    *("training.folds=[1]", "training.ssl_epochs=1", "training.ssl_steps=1"),
    *("training.encoder_epochs=0", "training.num_epochs=1", "training.episodes_per_epoch=1"),
    *("training.val_episodes=2", "training.test_episodes=2"),
)
"""A model that has seen next to nothing: speed does not hang on weights."""


def prepare(work: Path, quick: bool) -> latency_parts.Subject:
    """Make the model, its bundle, the tiles and a CT series, or take up those made before."""
    model, bundle, ct = (work / name for name in ("model", "bundle", "ct"))
    checkpoint = model / "best_model.pt"
    if not checkpoint.is_file():
        latency_parts.run_module("cdt_train.cli", "--kshot", "5", "--output-dir", model, *TOUCHED)
    if not (bundle / "bundle.json").is_file():
        latency_parts.run_module(
            "cdt_export.cli", "--checkpoint", checkpoint, "--output", bundle, "--fp16"
        )
    if not ct.is_dir():
        _write_series(ct)
    patient = model / "phantom_data" / "new_patient"
    tiles = tuple(sorted(patient.glob("*.tif")))
    return latency_parts.Subject(checkpoint, bundle, ct, tiles, quick)


def _write_series(folder: Path) -> None:
    """A chest-like series of 300 raw slices of 512 x 512, as large as real ones are."""
    from cdt_train.data.phantom_dicom import write_series

    rng = np.random.default_rng(0)
    coarse = rng.integers(-1000, 400, (latency_parts.SLICES, 32, 32), dtype=np.int16)
    hu = coarse.repeat(16, axis=1).repeat(16, axis=2)
    hu += rng.integers(-20, 20, hu.shape, dtype=np.int16)
    started = folder.with_name("ct.partial")
    shutil.rmtree(started, ignore_errors=True)  # of a run that was stopped
    write_series(started, hu, 0.7, "LATENCY", 0)
    started.rename(folder)


@click.command()
@click.argument("scenarios", nargs=-1, type=click.Choice([*SCENARIOS]), metavar="[SCENARIO ...]")
@click.option("--quick", is_flag=True, help="Fewer rounds: under a minute on 2 cores, once made.")
@click.option("--name", default="cpu", show_default=True, help="Names the results.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "models" / "latency",
    help="Where model, bundle and CT are made, once.  [default: models/latency]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def main(scenarios: tuple[str, ...], quick: bool, name: str, work: Path, as_json: bool) -> None:
    """Measure SCENARIOs (all, if none is named): engines, single_stream, offline, ct,
    cold_start, slide.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["CDT_CACHE"] = str(work / "cache")
    subject = prepare(work, quick)
    if not as_json:
        click.echo(latency_report.machine_text(machine()) + "\n")
    started = time.monotonic()
    found: dict[str, Any] = {}
    for scenario in scenarios or SCENARIOS:
        if not as_json:
            click.echo(f"{scenario} ...", err=True)
        alone = len(scenarios) == 1
        found[scenario] = SCENARIOS[scenario](subject) if alone else _apart(scenario, quick, work)
        if not as_json:
            click.echo(latency_report.TEXTS[scenario](found[scenario]) + "\n")
    _write(name, found, time.monotonic() - started, quick)
    if as_json:
        click.echo(json.dumps(found, indent=1))


def _apart(scenario: str, quick: bool, work: Path) -> Any:
    """Measure in a process of its own: the threads of one engine slow down the next."""
    line = [sys.executable, __file__, scenario, "--json", "--work", str(work)]
    done = subprocess.run([*line, "--quick"] if quick else line, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{scenario}: exit code {done.returncode}")
    return json.loads(done.stdout)[scenario]


def _write(name: str, found: Mapping[str, Any], seconds: float, quick: bool) -> None:
    if quick or set(found) != {*SCENARIOS}:
        return  # only a whole run is kept
    command = f"python benchmarks/latency.py --name {name}"
    path = write_result(f"latency-{name}", [command], seconds, found)
    latency_report.draw(found, RESULTS / f"latency-{name}.png")
    click.echo(f"written: {path} and its chart", err=True)


if __name__ == "__main__":
    main()
