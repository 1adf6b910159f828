"""The command `cdt-doctor`; heavy imports wait for the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import one_line, run
from cdt_runtime.errors import BackendError, InputError

if TYPE_CHECKING:
    from cdt_runtime.bundle import Bundle

EXAMPLES = """
\b
Examples:
  cdt-doctor                        what this machine has, which engines run
  cdt-doctor engines/NAME           and test and time each on a bundle
  cdt-doctor engines/NAME --json    the same as one JSON object
  cdt-doctor --build engines/NAME   build TensorRT's plans here first: minutes
  cdt-doctor drift SITE_TILES       does a site look like the training tiles?
  cdt-doctor audit LOG              is a log of cdt-infer --audit as it was?
  cdt-doctor sbom > sbom.json       what it is made of (CycloneDX)
  cdt-doctor sbom --licences        the same as a table with licences

\b
BUNDLE is a folder that cdt-export wrote.  [default: the newest in ./engines]
Exit code 0: an engine works. Exit code 2: none does, or an input can't be
used; the line on stderr says what to do.
Research use only: not a medical device.
"""


def doctor() -> NoReturn:
    """Entry point of `cdt-doctor`."""
    if sys.argv[1:] and sys.argv[1] in OTHERS:
        run(OTHERS[sys.argv[1]], sys.argv[2:])
    run(doctor_command)


@click.command(
    "cdt-doctor", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("path", required=False, metavar="[BUNDLE]")
@click.option("--build", is_flag=True, help="Build the bundle's TensorRT plans for this GPU.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.version_option(__version__, prog_name="cdt-doctor")
def doctor_command(path: str | None, build: bool, as_json: bool) -> None:
    """Say what this machine has, which inference engines run here, and why not.

    With a bundle each engine is tested against the stored answers, and timed
    on one tile.
    """
    from cdt_runtime.doctor import report

    bundle = _opened(path)
    if build:
        _build(bundle)
    found = report(bundle)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else as_text(found))
    if not any(engine["works"] for engine in found["engines"]):
        raise BackendError("no engine works here: each says above why, and what to do")


@click.command("cdt-doctor drift", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("tiles_dir")
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option("--channels", metavar="A,B,...", help="Channel names of tiles that carry none.")
@click.option("--mpp", type=click.FloatRange(min=0, min_open=True), help="Microns a pixel.")
@click.option("--backend", default="auto", show_default=True, help="As of cdt-infer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def drift_command(
    tiles_dir: str,
    bundle: str | None,
    channels: str | None,
    mpp: float | None,
    backend: str,
    as_json: bool,
) -> None:
    """Say whether a site's tiles look like the training tiles.

    TILES_DIR holds 20 or more tiles of the site, with the mix of classes that
    is seen there; no labels are needed. Where its folders are named as the
    bundle's classes, the accuracy is told, too.
    """
    from dataclasses import asdict

    from cdt_runtime.bundle import newest_bundle
    from cdt_runtime.classifier import FewShotClassifier
    from cdt_runtime.drift import as_text as drift_text
    from cdt_runtime.drift import measure_drift, site_tiles

    path = bundle or newest_bundle(Path("engines"))
    classifier = FewShotClassifier.open(path, backend=backend)
    names = [one.strip() for one in channels.split(",")] if channels else None
    found = measure_drift(classifier, *site_tiles(classifier, tiles_dir, channels=names, mpp=mpp))
    facts = {**asdict(found), "advised": found.advised, "verdict": found.verdict}
    click.echo(json.dumps(facts, indent=1) if as_json else drift_text(found))


@click.command("cdt-doctor audit", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("log")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def audit_command(log: str, as_json: bool) -> None:
    """Check that no line of an audit log was changed, taken out or put in.

    That its last lines are there, only the hash that is printed tells: keep it
    elsewhere.
    """
    from cdt_runtime.audit import verify

    state = verify(Path(log))
    if as_json:
        click.echo(json.dumps({"entries": state.entries, "last": state.last}))
    else:
        click.echo(f"{state.entries} entries, each follows from those before; last {state.last}")


@click.command("cdt-doctor sbom", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--licences", is_flag=True, help="A table of versions and licences in its place.")
def sbom_command(licences: bool) -> None:
    """List what the runtime is made of here, as CycloneDX JSON.

    Distributions with all that they need, and the codecs that are compiled into
    imagecodecs. Scanners of known vulnerabilities take it as it is.
    """
    from cdt_runtime.sbom import as_cyclonedx, as_table, installed_parts

    parts = installed_parts()
    click.echo(as_table(parts) if licences else as_cyclonedx(parts))


def _opened(path: str | None) -> Bundle | None:
    from cdt_runtime.bundle import MANIFEST, Bundle, newest_bundle

    if path is not None:
        if not path.strip():
            raise InputError("BUNDLE is empty: is a variable of your script unset?")
        return Bundle.open(path)
    folder = Path("engines")
    if not any(folder.glob(f"[!.]*/{MANIFEST}")):
        return None
    newest = newest_bundle(folder)
    click.echo(f"bundle: {newest} (the newest; BUNDLE chooses another)", err=True)
    return Bundle.open(newest)


def _build(bundle: Bundle | None) -> None:
    """Build all plans, with one line that tells how far it is."""
    from cdt_runtime.backends.trt_build import build_plans
    from cdt_runtime.progress import Progress

    if bundle is None:
        raise InputError("--build: no bundle in ./engines to build plans for: give a BUNDLE")
    total = len(bundle.manifest["graphs"])
    progress, folder = Progress("TensorRT plans", total), Path()
    progress.add(0)
    try:
        for _, path in build_plans(bundle):
            folder = path.parent
            progress.add(1)
    finally:
        progress.close()
    click.echo(f"built: {total} plans in {folder}", err=True)


def as_text(found: dict[str, Any]) -> str:
    """Lay a report out as lines."""
    facts, bundle = found["machine"], found["bundle"]
    gpus = ", ".join(facts["gpus"]) or "none that an NVIDIA driver tells of"
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    lines = [
        f"CDT Edge {found['version']}, Python {facts['python']}, {facts['system']}",
        f"processor    {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB",
        f"features     {' '.join(facts['features']) or 'none of those that speed inference up'}",
        f"GPU          {gpus}{driver}",
        f"packages     {_listed(found['packages'])}",
        f"cache        {found['cache'] or 'none: set CDT_CACHE'}",
        f"bundle       {_bundle_text(bundle)}",
        "",
    ]
    lines += [f"{engine['name']:<12} {_engine_text(engine)}" for engine in found["engines"]]
    if found["auto"]:
        lines.append(f"auto takes   {found['auto']}")
    return "\n".join(lines)


def _bundle_text(bundle: dict[str, str] | None) -> str:
    if bundle is None:
        return "none: with one, the engines are tested and timed"
    return f"{bundle['path']} ({bundle['precision']}, {bundle['identity']})"


def _engine_text(engine: dict[str, Any]) -> str:
    versions = f" ({_listed(engine['packages'])})" if engine["packages"] else ""
    if not engine["works"]:
        return f"no{versions}: {one_line(engine['problem'])}"
    if engine["gap"] is None:
        return f"runs{versions}"
    exact = " in fp32" if engine["precision"] == "fp32" else ""
    return (
        f"passes the self-test{exact}{versions}: off by at most {engine['gap']:.1e} of a range, "
        f"one tile {engine['tile_ms']:.2f} ms"
    )


def _listed(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


OTHERS = {"drift": drift_command, "audit": audit_command, "sbom": sbom_command}
"""Commands behind the first word."""
