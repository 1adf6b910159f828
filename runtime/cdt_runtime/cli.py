"""The command `cdt-infer`. Only this module reads its options; heavy imports wait for the work."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import PlaneChoice, one_line, run, say
from cdt_runtime.errors import InputError

if TYPE_CHECKING:
    from cdt_runtime.audit import AuditLog
    from cdt_runtime.backends import Precision
    from cdt_runtime.classifier import FewShotClassifier
    from cdt_runtime.cohort import Options
    from cdt_runtime.prediction import Context, TileInput
    from cdt_runtime.tiff_meta import Z
    from cdt_runtime.tile_stream import Failure

EXAMPLES = """
\b
Examples:
  cdt-infer ct/R_001 tile.tif              class, probabilities, distances
  cdt-infer ct/R_001 *.tif --json          one JSON object a line
  cdt-infer ct/R_001 tiles/                every tile of a folder
  cdt-infer ct/R_001 slide.svs --slide     a whole slide: table, areas, map
  cdt-infer --no-ct tile.tif               the tile alone
  cdt-infer --manifest cohort.csv          a table of patients, row by row

\b
CT_DIR is a folder that holds one DICOM CT series, at any depth. A TILE is a
TIFF, PNG or JPEG file, a folder with one image file a marker, or a folder of
tiles. With --slide it is an OME-TIFF, SVS or other tiled TIFF; a run that was
stopped goes on where it was. Exit code 2 means that an input could not be
used; the line on stderr says what to do.
Research use only: not a medical device.
"""


def infer() -> NoReturn:
    """Entry point of `cdt-infer`."""
    run(infer_command, extra="wsi")


@click.command(
    "cdt-infer", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("paths", nargs=-1, metavar="CT_DIR TILE [TILE ...]")
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto (the fastest that passes the self-test), tensorrt, cuda, openvino or onnxruntime.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32"]),
    default="auto",
    show_default=True,
    help="fp32: never below that of the bundle.",
)
@click.option("--tta", is_flag=True, help="The mean of four orientations: four times the work.")
@click.option("--transductive", is_flag=True, help="Draw the classes towards all TILEs first.")
@click.option(
    "--coverage",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Also the set of classes that holds the right one this often, such as 0.9.",
)
@click.option("--card", metavar="FILE", help="Also a page of evidence on the one TILE (HTML).")
@click.option("--trust", metavar="KEY", help="Refuse a bundle that this public key did not sign.")
@click.option("--audit", metavar="FILE", help="Also a line an answer in an append-only log.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a tile, one a line.")
@click.option("--no-ct", is_flag=True, help="Ignore the CT; CT_DIR may then be left out.")
@click.option("--series", metavar="UID", help="Which series, where CT_DIR holds several.")
@click.option("--allow-resample", is_flag=True, help="Accept missing slices by resampling.")
@click.option("--channels", metavar="A,B,...", help="Channel names of tiles that carry none.")
@click.option("--fill-missing", is_flag=True, help="Fill channels a tile lacks with zeros.")
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    help="Microns a pixel: of the tile files; with --slide those to look at it with.  [default: "
    "what the file says; with --slide what the model was trained at]",
)
@click.option(
    "--z",
    type=PlaneChoice(),
    metavar="N|max",
    help="Which plane of an OME-TIFF's stack, counted from 1, or max: of all.",
)
@click.option("--slide", "as_slide", is_flag=True, help="Cut the one TILE, a whole slide, up.")
@click.option("--manifest", metavar="FILE", help="A table of patients in place of CT_DIR and TILE.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Rows of a manifest on this Ray cluster; without ADDRESS: on one of this machine.",
)
@click.option("--parquet", is_flag=True, help="Also the table of answers of --out as Parquet.")
@click.option(
    "--out",
    metavar="DIR",
    help="Folder for the results of a slide or manifest.  [default: ./NAME.cdt]",
)
@click.version_option(__version__, prog_name="cdt-infer")
def infer_command(
    paths: tuple[str, ...],
    bundle: str | None,
    backend: str,
    precision: Precision,
    tta: bool,
    transductive: bool,
    coverage: float | None,
    card: str | None,
    trust: str | None,
    audit: str | None,
    as_json: bool,
    no_ct: bool,
    series: str | None,
    allow_resample: bool,
    channels: str | None,
    fill_missing: bool,
    mpp: float | None,
    z: Z,
    as_slide: bool,
    manifest: str | None,
    ray: str | None,
    parquet: bool,
    out: str | None,
) -> None:
    """Classify pathology tiles or a whole slide, with the patient's CT as context.

    Without training anything: the bundle's prototypes decide, and "can't tell"
    is an answer.
    """
    from cdt_runtime.sandbox.process import SANDBOX

    ct_dir, tiles = (None, ()) if manifest else _split_paths(paths, no_ct)
    _refuse_empty(
        {
            "--bundle": bundle,
            "--series": series,
            "--channels": channels,
            "--out": out,
            "--card": card,
            "--audit": audit,
            "--trust": trust,
            "--manifest": manifest,
            "--ray": ray,
        }
    )
    if manifest:
        _refuse_beside_manifest(
            {
                "CT_DIR and TILE": bool(paths),
                "--slide": as_slide,
                "--series": bool(series),
                "--card": bool(card),
                "--transductive": transductive,
                "--coverage": bool(coverage),
            }
        )
    else:
        _refuse_slide_options(as_slide, tiles, out)
    if ray and (audit or not manifest):
        raise InputError("--ray is for a --manifest, without --audit: a log is of one machine")
    _refuse_combined(coverage, {"--slide": as_slide, "--tta": tta, "--transductive": transductive})
    if parquet:
        if not (manifest or as_slide):
            raise InputError("--parquet is for --manifest and --slide: others print their answers")
        import pyarrow.parquet  # noqa: F401  missing, it must be said before hours of work
    if z is not None and as_slide:
        raise InputError("--z is for tiles: not with --slide")
    if transductive and (as_slide or card):
        raise InputError("--transductive is for tiles alone: leave --slide and --card out")
    log = _audit_log(audit)
    SANDBOX.start()  # it gets ready while the bundle is opened
    classifier = _open(
        bundle,
        backend,
        precision,
        tta=tta,
        coverage=coverage,
        trust=Path(trust) if trust else None,
    )
    if fill_missing:
        from cdt_runtime.tile_input import require_filling

        require_filling(classifier.preprocess)
    names = [name.strip() for name in channels.split(",")] if channels else None
    if manifest:
        from cdt_runtime.cohort import Options

        options = Options(
            {"channels": names, "fill_missing": fill_missing, "mpp": mpp},
            z,
            allow_resample,
            no_ct,
            log,
        )
        sys.exit(_cohort(classifier, Path(manifest), options, ray, out, as_json, parquet))
    context = classifier.context(ct_dir, series_uid=series, allow_resample=allow_resample)
    if coverage and (note := classifier.certificate(_counted(classifier, context)).note):
        click.echo(f"note: {note}", err=True)
    reading: dict[str, Any] = {"channels": names, "fill_missing": fill_missing, "mpp": mpp}
    if as_slide:
        sys.exit(
            _slide(classifier, Path(tiles[0]), context, out, reading, as_json, card, log, parquet)
        )
    reading["z"] = z
    found = _expanded(classifier, tiles, names)
    if card and len(found) != 1:
        raise InputError(f"--card with {len(found)} tiles: give one at a time")
    code = _classify(classifier, found, reading, context, as_json, transductive, log)
    if card and not code:
        read_ct = ct_dir and partial(
            classifier.contexts.input_of_folder, Path(ct_dir), series, allow_resample
        )
        _write_card(classifier, found[0], reading, context, read_ct or None, Path(card))
    sys.exit(code)


def _split_paths(paths: tuple[str, ...], no_ct: bool) -> tuple[str | None, tuple[str, ...]]:
    if not paths:
        raise InputError("no CT_DIR and TILE given: see cdt-infer --help")
    if "" in paths:
        raise InputError("an empty path was given: is a variable of your script unset?")
    if no_ct:
        from cdt_runtime.ct_folder import holds_dicom

        tiles = paths[1:] if len(paths) > 1 and holds_dicom(Path(paths[0])) else paths
        return None, tiles
    if os.path.isfile(paths[0]):  # unlike Path.is_file it never raises
        raise InputError(
            f"{Path(paths[0]).name}: CT_DIR comes first and is a folder of DICOM slices, this is a "
            f"file: cdt-infer CT_DIR TILE, or cdt-infer --no-ct TILE"
        )
    if len(paths) == 1:
        raise InputError("no TILE given: cdt-infer CT_DIR TILE [TILE ...]")
    return paths[0], paths[1:]


def _refuse_slide_options(as_slide: bool, tiles: tuple[str, ...], out: str | None) -> None:
    if out and not as_slide:
        raise InputError("--out is for whole slides: add --slide, or redirect standard output")
    if as_slide and len(tiles) != 1:
        raise InputError(f"--slide with {len(tiles)} files: give one slide at a time")


def _refuse_combined(coverage: float | None, others: dict[str, bool]) -> None:
    for name, given in others.items():
        if coverage and given:
            raise InputError(
                f"--coverage is certified for single tiles as they are: not with {name}"
            )


def _expanded(
    classifier: FewShotClassifier, tiles: tuple[str, ...], names: list[str] | None
) -> tuple[str, ...]:
    """Put the tiles of a folder in its place."""
    from cdt_runtime.tile_folder import tiles_under

    expected = classifier.preprocess.channels
    return tuple(one for tile in tiles for one in tiles_under(tile, expected, names))


def _refuse_beside_manifest(others: dict[str, bool]) -> None:
    for name, given in others.items():
        if given:
            raise InputError(f"--manifest names the inputs of each patient: not with {name}")


def _cohort(
    classifier: FewShotClassifier,
    manifest: Path,
    options: Options,
    ray: str | None,
    out: str | None,
    as_json: bool,
    parquet: bool,
) -> int:
    """Answer a table of patients, write the results and print the summary; return the exit code."""
    import json

    from cdt_runtime import cohort

    rows = cohort.read_manifest(manifest)
    folder = Path(out) if out else Path(f"{manifest.name.split('.')[0]}.cdt")
    answer = None
    if ray:
        from cdt_runtime.cohort_ray import ray_rows

        asked = {
            "backend": classifier.backend,
            "precision": classifier.precision,
            "tta": classifier.tta,
        }
        answer = ray_rows(ray, classifier.bundle.path, asked, options, folder)
    found = cohort.run_cohort(classifier, rows, options, folder, answer)
    files = [cohort.RESULTS, cohort.TABLE]
    if parquet or ray:
        from cdt_runtime.parquet import write_parquet

        files.append(write_parquet(folder / cohort.TABLE, cohort.TEXT_COLUMNS, ("row",)).name)
    for row in found:
        for why in cohort.failures_of(row):
            say(f"row {row['row']}: {why}")
    summary = {**cohort.summary_of(found), "out": str(folder), "files": files}
    click.echo(json.dumps(summary) if as_json else cohort.as_text(summary))
    return InputError.exit_code if summary["failed_rows"] else 0


def _slide(
    classifier: FewShotClassifier,
    path: Path,
    context: Context,
    out: str | None,
    reading: dict[str, Any],
    as_json: bool,
    card: str | None,
    log: AuditLog | None,
    parquet: bool,
) -> int:
    """Classify a slide, write its files and print the summary; return the exit code."""
    import json

    import tifffile  # noqa: F401  missing, it must be said before hours of work

    from cdt_runtime.slides import results
    from cdt_runtime.slides.job import TABLE, classify_slide

    folder = Path(out) if out else Path(f"{path.name.split('.')[0]}.cdt")
    found = classify_slide(classifier, path, context, folder, **reading)
    summary = results.write_results(found, classifier, context, folder)
    if parquet:
        from cdt_runtime.parquet import write_parquet

        made = write_parquet(folder / TABLE, ("label", "reason"), ("row", "column"))
        summary["files"].append(made.name)
    if log:
        from cdt_runtime.audit import of_slide

        log.append(of_slide(path, summary, classifier, context))
    click.echo(json.dumps(summary, ensure_ascii=False) if as_json else results.as_text(summary))
    if card:
        from cdt_runtime.evidence.page import slide_page

        _write_page(Path(card), slide_page(summary, (folder / results.OVERVIEW).read_bytes()))
    for tile in found.unreadable[:1]:
        count = len(found.unreadable)
        say(f"{path.name}: {count} tiles can't be read, the first: {tile.reason}")
    return InputError.exit_code if found.unreadable else 0


def _write_card(
    classifier: FewShotClassifier,
    tile: str,
    reading: dict[str, Any],
    context: Context,
    read_ct: Callable[[], Any] | None,
    path: Path,
) -> None:
    """Write the page of evidence of one tile."""
    from cdt_runtime.evidence.found import find_evidence
    from cdt_runtime.evidence.page import tile_page
    from cdt_runtime.report import distinct_names

    read = replace(classifier.read(tile, **reading), name=distinct_names([tile])[0])
    _write_page(path, tile_page(find_evidence(classifier, read, context, read_ct), classifier))


def _write_page(path: Path, page: str) -> None:
    from cdt_runtime.files import write_synced

    try:
        write_synced(path, page.encode())
    except OSError as error:
        raise InputError(f"--card {path}: can't be written ({error.strerror})") from error
    click.echo(f"card: {path}", err=True)


def _refuse_empty(options: dict[str, str | None]) -> None:
    for name, value in options.items():
        if value is not None and not value.strip():
            raise InputError(f"{name} is empty: is a variable of your script unset?")


def _open(
    bundle: str | None, backend: str, precision: Precision, **asked: Any
) -> FewShotClassifier:
    from cdt_runtime.bundle import newest_bundle
    from cdt_runtime.classifier import FewShotClassifier

    path = Path(bundle) if bundle else newest_bundle(Path("engines"))
    if not bundle:
        click.echo(f"bundle: {path} (the newest; --bundle chooses another)", err=True)
    classifier = FewShotClassifier.open(path, backend=backend, precision=precision, **asked)
    for note in classifier.notes:
        click.echo(f"note: {one_line(note)}", err=True)
    return classifier


def _counted(classifier: FewShotClassifier, context: Context) -> Context:
    """The context that answers rest on."""
    return classifier.context(None) if classifier.prototypes.ct_off else context


def _classify(
    classifier: FewShotClassifier,
    tiles: tuple[str, ...],
    reading: dict[str, Any],
    context: Context,
    as_json: bool,
    transductive: bool,
    log: AuditLog | None,
) -> int:
    """Print an answer or an error for each tile, in the order given; return the exit code."""
    from cdt_runtime import report
    from cdt_runtime.audit import of_answer
    from cdt_runtime.tile_stream import Failure, answers, read_ahead

    inputs: Iterable[TileInput | Failure]
    inputs = read_ahead(classifier, tiles, report.distinct_names(tiles), reading)
    if transductive:  # all are read into memory first
        inputs = list(inputs)
        used = classifier.transduce([x for x in inputs if not isinstance(x, Failure)], context)
        click.echo(f"note: classes drawn towards {used} tiles", err=True)
    code, last = 0, None
    outcomes: Counter[str] = Counter()
    for answer in answers(classifier, inputs, context):
        if log:  # what was not logged is not said
            log.append(of_answer(answer, classifier, context))
        if isinstance(answer, Failure):
            code = answer.error.exit_code
            outcomes["unreadable"] += 1
            say(answer.error)
            if as_json:
                click.echo(report.failure_as_json(answer.tile, one_line(answer.error)))
        else:
            last = answer
            outcomes[(answer.reason or "answered").split(":")[0]] += 1
            text = report.as_json(answer, classifier) if as_json else report.as_text(answer)
            click.echo(text)
    if last is not None and not as_json:
        click.echo("\n" + report.context_text(classifier, last, outcomes))
    return code


def _audit_log(path: str | None) -> AuditLog | None:
    if path is None:
        return None
    from cdt_runtime.audit import AuditLog

    return AuditLog(Path(path))
