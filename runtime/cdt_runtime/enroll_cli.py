"""The command `cdt-enroll`; heavy imports wait for the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import PlaneChoice, run
from cdt_runtime.errors import InputError

if TYPE_CHECKING:
    from cdt_runtime.bundle import Bundle
    from cdt_runtime.signing import Sign
    from cdt_runtime.tiff_meta import Z

EXAMPLES = """
\b
Examples:
  cdt-enroll --class "invasion front" a.tif b.tif c.tif
  cdt-enroll --class necrosis new/ --dry-run
  cdt-enroll --from TILES                  all of a folder CLASS/*
  cdt-enroll --from tiles.csv              or of a file with path,label
  cdt-enroll --remove necrosis
  cdt-enroll --adapt SITE_TILES            to the stain of another site
  cdt-enroll --list
  cdt-enroll --undo

\b
No training and no new engine: the tiles join the bundle's support set, of
which classes are made. Older sets stay in the bundle; --undo goes back.
Each change tells how well the tiles are told apart when one is left out,
before and after, and what looks wrong.
Research use only: not a medical device.
"""


def enroll() -> NoReturn:
    """Entry point of `cdt-enroll`."""
    run(enroll_command)


@click.command(
    "cdt-enroll", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("tiles", nargs=-1, metavar="[TILE ...]")
@click.option("--class", "name", metavar="NAME", help="The class that the tiles belong to.")
@click.option("--from", "source", metavar="PATH", help="Folder CLASS/*, or CSV of path,label.")
@click.option("--remove", metavar="NAME", help="Take a class out.")
@click.option("--adapt", metavar="TILES_DIR", help="Bring a site's stain to that of training.")
@click.option("--list", "show", is_flag=True, help="Show classes and versions.")
@click.option("--undo", "back", is_flag=True, help="Go back by one version.")
@click.option("--ct", metavar="CT_DIR", help="The patient's CT.")
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option("--dry-run", is_flag=True, help="Tell what would change, and change nothing.")
@click.option("--sign", metavar="KEY", help="Sign the changed bundle with this private key.")
@click.option("--audit", metavar="FILE", help="Also a line in an append-only log.")
@click.option("--channels", metavar="A,B,...", help="Channel names of tiles that carry none.")
@click.option("--mpp", type=click.FloatRange(min=0, min_open=True), help="Microns a pixel.")
@click.option("--z", type=PlaneChoice(), metavar="N|max", help="As of cdt-infer.")
@click.option("--backend", default="auto", show_default=True, help="As of cdt-infer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.version_option(__version__, prog_name="cdt-enroll")
def enroll_command(
    tiles: tuple[str, ...],
    name: str | None,
    source: str | None,
    remove: str | None,
    adapt: str | None,
    show: bool,
    back: bool,
    ct: str | None,
    bundle: str | None,
    dry_run: bool,
    sign: str | None,
    audit: str | None,
    channels: str | None,
    mpp: float | None,
    z: Z,
    backend: str,
    as_json: bool,
) -> None:
    """Add classes to a bundle from a few tiles, or take them out."""
    from cdt_runtime.bundle import Bundle, newest_bundle

    asked = [bool(name), bool(source), bool(remove), bool(adapt), show, back]
    if sum(asked) != 1 or bool(tiles) != bool(name):
        raise InputError(
            "give one of --class NAME TILE ..., --from PATH, --remove NAME, --adapt TILES_DIR, "
            "--list and --undo"
        )
    seal, log = _signer(sign), _audit_log(audit)
    opened = Bundle.open(bundle or newest_bundle(Path("engines")))
    if opened.signed and not (seal or show or dry_run):
        click.echo("note: the bundle's signature ends with this change: --sign gives one", err=True)
    if show or back:
        shown = _undone(opened, dry_run, seal) if back else opened
        if back and log:
            log("undo", opened, shown)
        _show(shown, as_json)
        return
    from cdt_runtime.classifier import FewShotClassifier
    from cdt_runtime.enroll import (
        adapting,
        adding,
        facts_of,
        listed_tiles,
        new_tiles,
        removing,
        write_change,
    )
    from cdt_runtime.tile_folder import tiles_under

    classifier = FewShotClassifier(opened, backend=backend)
    expected = classifier.preprocess.channels
    names = [one.strip() for one in channels.split(",")] if channels else None
    drift = None
    if remove:
        change = removing(classifier, remove)
    elif adapt:
        change, drift = adapting(classifier, adapt, channels=names, mpp=mpp)
    else:
        if source:
            listed = listed_tiles(Path(source), expected)
        else:
            paths = [path for tile in tiles for path in tiles_under(tile, expected, names)]
            listed = [(path, name or "") for path in paths]
        change = adding(classifier, listed, ct, channels=names, mpp=mpp, z=z)
    changed = opened if dry_run else write_change(opened, change, seal)
    if log and not dry_run:
        what = "remove" if remove else "adapt" if adapt else "enroll"
        log(what, opened, changed, new_tiles(change))
    facts = facts_of(change, changed, written=not dry_run)
    if drift:
        facts["drift"] = asdict(drift)
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    if drift:
        from cdt_runtime.drift import as_text

        click.echo(as_text(drift) + "\n")
    click.echo(_text(facts))


def _signer(path: str | None) -> Sign | None:
    if path is None:
        return None
    from cdt_runtime.signing import signer

    return signer(Path(path))


def _audit_log(path: str | None) -> Callable[..., None] | None:
    """What writes a change into the log; a log that can't be written is said before the work."""
    if path is None:
        return None
    from cdt_runtime.audit import AuditLog, of_change

    log = AuditLog(Path(path))
    return lambda *change: log.append(of_change(*change))


def _undone(bundle: Bundle, dry_run: bool, sign: Sign | None) -> Bundle:
    from cdt_runtime.enroll import undo

    if dry_run:
        raise InputError("--undo with --dry-run: --list shows the version that it goes back to")
    return undo(bundle, sign)


def _show(bundle: Bundle, as_json: bool) -> None:
    from cdt_runtime.enroll import versions

    found = versions(bundle)
    if as_json:
        facts = {"bundle": bundle.identity, "path": str(bundle.path), "versions": found}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for one in found:
        click.echo(f"version {one['version']}   {one['created']}   {one['what']}")
    tiles = found[-1]["tiles"]
    width = max(map(len, tiles))
    click.echo("\n" + "\n".join(f"{name:{width}}  {count} tiles" for name, count in tiles.items()))
    click.echo(f"\nbundle    {bundle.path} ({bundle.identity})")


def _text(facts: dict[str, Any]) -> str:
    """The same as a text."""
    old, new = facts["tiles_before"], facts["tiles"]
    width = max(map(len, [*old, *new]))
    lines = [
        f"{name:{width}}  {old.get(name, 0):3} -> {new.get(name, 0):3} tiles"
        for name in dict.fromkeys([*old, *new])
    ]
    shares = [facts["left_out_accuracy_before"], facts["left_out_accuracy"]]
    shown = ["unknown" if one is None else f"{one:.3f}" for one in shares]
    lines += [
        "",
        f"accuracy on each tile when it is left out: {shown[0]} -> {shown[1]} "
        f"(mean over classes, {facts['left_out_tiles']} tiles)",
    ]
    lines += [
        f"looks mislabelled: {one['tile']} of {one['label']}, taken for {one['nearest']} "
        f"({one['probability']:.2f})"
        for one in facts["mislabelled"]
    ]
    lines += [
        f"too close: {one['first']} and {one['second']}, {one['share']:.0%} of their tiles are "
        f"taken for the other"
        for one in facts["too_close"]
    ]
    lines += [f"all but the same: {first} and {second}" for first, second in facts["copies"]]
    state = "written" if facts["written"] else "dry run, nothing written"
    lines += ["", f"{state}   {facts['what']}", f"bundle    {facts['path']} ({facts['bundle']})"]
    return "\n".join(lines)
