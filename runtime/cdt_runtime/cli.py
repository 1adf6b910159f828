"""The runtime's commands. Only this module reads options; heavy imports wait for the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import one_line, run, say
from cdt_runtime.errors import CdtError, InputError

if TYPE_CHECKING:
    from cdt_runtime.classifier import Context, FewShotClassifier, TileInput

EXAMPLES = """
\b
Examples:
  cdt-infer ct/R_001 tile.tif              class, probabilities, distances
  cdt-infer ct/R_001 *.tif --json          one JSON object a line
  cdt-infer --no-ct tile.tif               the tile alone

\b
CT_DIR is a folder that holds one DICOM CT series, at any depth. A TILE is a
TIFF, PNG or JPEG file, or a folder with one image file a marker. Exit code 2
means that an input could not be used; the line on stderr says what to do.
Research use only: not a medical device.
"""


def infer() -> NoReturn:
    """Entry point of `cdt-infer`."""
    run(infer_command)


@click.command(
    "cdt-infer", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("paths", nargs=-1, metavar="CT_DIR TILE [TILE ...]")
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option("--backend", default="onnxruntime", show_default=True, help="Inference engine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a tile, one a line.")
@click.option("--no-ct", is_flag=True, help="Ignore the CT; CT_DIR may then be left out.")
@click.option("--series", metavar="UID", help="Which series, where CT_DIR holds several.")
@click.option("--allow-resample", is_flag=True, help="Accept missing slices by resampling.")
@click.option("--channels", metavar="A,B,...", help="Channel names of tiles that carry none.")
@click.option("--fill-missing", is_flag=True, help="Fill channels a tile lacks with zeros.")
@click.option("--mpp", type=click.FloatRange(min=0, min_open=True), help="Microns a pixel.")
@click.version_option(__version__, prog_name="cdt-infer")
def infer_command(
    paths: tuple[str, ...],
    bundle: str | None,
    backend: str,
    as_json: bool,
    no_ct: bool,
    series: str | None,
    allow_resample: bool,
    channels: str | None,
    fill_missing: bool,
    mpp: float | None,
) -> None:
    """Classify pathology tiles, with the patient's CT as context.

    Without training anything: the bundle's prototypes decide, and "can't tell"
    is an answer.
    """
    ct_dir, tiles = _split_paths(paths, no_ct)
    classifier = _open(bundle, backend)
    context = classifier.context(ct_dir, series_uid=series, allow_resample=allow_resample)
    reading = {
        "channels": [name.strip() for name in channels.split(",")] if channels else None,
        "fill_missing": fill_missing,
        "mpp": mpp,
    }
    failures: list[tuple[str, CdtError]] = []
    inputs = _readable(classifier, tiles, reading, failures)
    _print_predictions(classifier, inputs, context, as_json)
    _report_failures(failures, as_json)


def _split_paths(paths: tuple[str, ...], no_ct: bool) -> tuple[str | None, tuple[str, ...]]:
    if not paths:
        raise InputError("no CT_DIR and TILE given: see cdt-infer --help")
    if no_ct:
        from cdt_runtime.ct_folder import holds_dicom

        tiles = paths[1:] if len(paths) > 1 and holds_dicom(Path(paths[0])) else paths
        return None, tiles
    first = Path(paths[0])
    if first.is_file():
        raise InputError(
            f"{first.name}: CT_DIR comes first and is a folder of DICOM slices, this is a file: "
            f"cdt-infer CT_DIR TILE, or cdt-infer --no-ct TILE"
        )
    if len(paths) == 1:
        raise InputError("no TILE given: cdt-infer CT_DIR TILE [TILE ...]")
    return paths[0], paths[1:]


def _open(bundle: str | None, backend: str) -> FewShotClassifier:
    from cdt_runtime.bundle import newest_bundle
    from cdt_runtime.classifier import FewShotClassifier

    path = Path(bundle) if bundle else newest_bundle(Path("engines"))
    if not bundle:
        click.echo(f"bundle: {path} (the newest; --bundle chooses another)", err=True)
    return FewShotClassifier.open(path, backend=backend)


def _readable(
    classifier: FewShotClassifier,
    tiles: tuple[str, ...],
    reading: dict[str, Any],
    failures: list[tuple[str, CdtError]],
) -> Iterator[TileInput]:
    for tile in tiles:
        try:
            yield classifier.read(tile, **reading)
        except InputError as error:
            failures.append((tile, error))


def _print_predictions(
    classifier: FewShotClassifier, inputs: Iterator[TileInput], context: Context, as_json: bool
) -> None:
    from cdt_runtime import report

    last = None
    for prediction in classifier.predict_each(inputs, context):
        last = prediction
        click.echo(
            report.as_json(prediction, classifier) if as_json else report.as_text(prediction)
        )
    if last is not None and not as_json:
        click.echo("\n" + report.context_text(classifier, last))


def _report_failures(failures: list[tuple[str, CdtError]], as_json: bool) -> None:
    for tile, error in failures:
        say(error)
        if as_json:
            click.echo(json.dumps({"tile": Path(tile).name, "error": one_line(error)}))
    if failures:
        sys.exit(failures[0][1].exit_code)
