"""Classes enrolled into a bundle, and taken out of it: what would change, and the change.

A change writes a new version of the support set; older ones stay in the bundle, so that each change
can be undone. Graphs are not touched.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.bundle import Bundle, change_bundle
from cdt_runtime.classifier import CtLike, FewShotClassifier
from cdt_runtime.drift import Drift, measure_drift, site_tiles
from cdt_runtime.errors import InputError, PrototypeError
from cdt_runtime.printable import counted
from cdt_runtime.prototypes import FACTS, TENSORS, Prototypes
from cdt_runtime.review import Review, review
from cdt_runtime.signing import Sign
from cdt_runtime.support import NewTiles, added, class_name, without_class
from cdt_runtime.tile_folder import tiles_under

VERSIONS = "prototype_versions"


@dataclass(frozen=True, eq=False)
class Change:
    """A change of a bundle's support set that has not been written.

    Attributes:
        what: it does, in words.
        before: the support set.
        after: the same, changed.
        found: of each, how well its tiles are told apart.
        names: of the new tiles, in their order, which is that of the last tiles of `after`.
    """

    what: str
    before: Prototypes
    after: Prototypes
    found: tuple[Review, Review]
    names: tuple[str, ...] = ()

    def name_of(self, place: int) -> str:
        """Name of a support tile: its file's if it is new, else the start of its hash."""
        new = place - (len(self.after.labels) - len(self.names))
        return self.names[new] if new >= 0 else f"tile {self.after.support_sha256[place][:12]}"


def listed_tiles(source: Path, expected: Sequence[str]) -> list[tuple[str, str]]:
    """List the tiles and classes of a folder `CLASS/*`, or of a CSV file `path,label`.

    Args:
        source: the folder or file; paths in a file are relative to it.
        expected: the model's channels.

    Raises:
        InputError: there are none, or a column is missing.
    """
    if source.is_dir():
        found = [
            (path, folder.name)
            for folder in sorted(one for one in source.iterdir() if one.is_dir())
            for path in tiles_under(str(folder), expected)
            if Path(path) != folder
        ]
    else:
        found = _rows(source)
    if not found:
        raise InputError(f"{source}: no tiles: expected folders CLASS/*, or a CSV of path,label")
    return found


def _rows(source: Path) -> list[tuple[str, str]]:
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: can't be read as CSV ({error}): check the file") from error
    for number, row in enumerate(rows, start=2):
        if not row.get("path") or not row.get("label"):
            raise InputError(
                f"{source} line {number}: expected the columns path,label, both filled"
            )
    return [(str(source.parent / row["path"]), row["label"]) for row in rows]


def adding(
    classifier: FewShotClassifier,
    tiles: Sequence[tuple[str, str]],
    ct: CtLike = None,
    **reading: Any,
) -> Change:
    """Prepare to add tiles to their classes; nothing is written.

    Args:
        classifier: of the bundle.
        tiles: path and class of each.
        ct: the patient's CT; it is kept where the bundle's support tiles have theirs.
        **reading: as `FewShotClassifier.read` takes them.

    Raises:
        TileError, SeriesError: an input can't be used.
        PrototypeError: a tile is in the support set already, or shows no tissue.
    """
    labels = [class_name(label) for _, label in tiles]
    inputs = [classifier.read(path, **reading) for path, _ in tiles]
    for tile in inputs:
        if tile.blank:
            raise PrototypeError(f"{tile.name}: shows no tissue: leave it out")
    before = classifier.prototypes
    context = classifier.context(ct)
    new = NewTiles(
        names=tuple(path for path, _ in tiles),
        labels=tuple(labels),
        sha256=tuple(tile.sha256 for tile in inputs),
        tokens=classifier.encode(inputs),
        statistics=np.stack([tile.statistics for tile in inputs]),
        ct_tokens=context.tokens[0] if context.used else None,
    )
    counts = {name: labels.count(name) for name in dict.fromkeys(labels)}
    what = ", ".join(f"{counted(count, 'tile')} to {name}" for name, count in counts.items())
    return _change(classifier, f"added {what}", added(before, new), new.names)


def removing(classifier: FewShotClassifier, name: str) -> Change:
    """Prepare to take a class out; nothing is written.

    Raises:
        PrototypeError: there is none of that name, or fewer than two would be left.
    """
    return _change(classifier, f"removed {name}", without_class(classifier.prototypes, name))


def adapting(classifier: FewShotClassifier, folder: str, **reading: Any) -> tuple[Change, Drift]:
    """Prepare to bring a site's tiles to the stain of training; nothing is written.

    Args:
        classifier: of the bundle.
        folder: of the site's tiles.
        **reading: as `FewShotClassifier.read` takes them.

    Raises:
        TileError: a tile can't be used.
        InputError: it is not advised, or tiles have been enrolled already.
    """
    before = classifier.prototypes
    if before.adaptation is not None or before.statistics is not None:
        what = "adapted to a site" if before.adaptation else "holding tiles enrolled"
        raise InputError(
            f"--adapt: the bundle is {what} already: go back with cdt-enroll --undo, adapt, and "
            f"enrol then"
        )
    drift = measure_drift(classifier, *site_tiles(classifier, folder, **reading))
    if not drift.advised:
        raise InputError(f"--adapt: {drift.verdict}")
    after = replace(before, adaptation=drift.adaptation, held_out=())
    return _change(classifier, f"adapted to {counted(drift.tiles, 'tile')}", after), drift


def _change(
    classifier: FewShotClassifier, what: str, after: Prototypes, names: tuple[str, ...] = ()
) -> Change:
    before = classifier.prototypes
    return Change(
        what, before, after, (_review(classifier, before), _review(classifier, after)), names
    )


def _review(classifier: FewShotClassifier, support: Prototypes) -> Review:
    embedded = classifier.embed_support(support, classifier.context(None))
    facts = (support.labels, support.classes, support.fit, support.scale)
    return review(embedded, support.tokens, *facts)


def new_tiles(change: Change) -> tuple[str, ...]:
    """Return the hash of each tile that a change brings in."""
    known = set(change.before.support_sha256)
    return tuple(one for one in change.after.support_sha256 if one not in known)


def write_change(bundle: Bundle, change: Change, sign: Sign | None = None) -> Bundle:
    """Write a change as the bundle's newest version, signed anew or no more.

    Raises:
        BundleError: the bundle can't be written, or was changed meanwhile.
    """
    known = versions(bundle, change.before)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    latest = _version(known[-1]["version"] + 1, now, change.what, change.after)
    older = known[-1]["version"]
    return change_bundle(
        bundle,
        change.after.to_files(),
        _kept(bundle, lambda name: _old(name, older) if name in (TENSORS, FACTS) else name),
        {VERSIONS: [*known, latest]},
        sign,
    )


def facts_of(change: Change, bundle: Bundle, *, written: bool) -> dict[str, Any]:
    """Say what a change does, as `cdt-enroll --json` prints it."""
    before, after = change.found
    return {
        "what": change.what,
        "written": written,
        "bundle": bundle.identity,
        "path": str(bundle.path),
        "tiles_before": change.before.counts(),
        "tiles": change.after.counts(),
        "left_out_accuracy_before": before.accuracy,
        "left_out_accuracy": after.accuracy,
        "left_out_tiles": after.tested,
        "mislabelled": [
            {"tile": change.name_of(one.place), **asdict(one)} for one in after.doubtful
        ],
        "too_close": [asdict(one) for one in after.close],
        "copies": [[change.name_of(place) for place in pair] for pair in after.copies],
    }


def undo(bundle: Bundle, sign: Sign | None = None) -> Bundle:
    """Go back to the version before the newest, which is lost; the first is the bundle as it was.

    Raises:
        PrototypeError: there is none.
        BundleError: the bundle can't be written, or was changed meanwhile.
    """
    known = versions(bundle)
    if len(known) < 2:
        raise PrototypeError(f"{bundle.path}: nothing to undo: it is as cdt-export wrote it")
    older = known[-2]["version"]
    back = {_old(name, older): name for name in (TENSORS, FACTS)}
    gone = (TENSORS, FACTS)
    return change_bundle(
        bundle,
        {},
        _kept(bundle, lambda name: None if name in gone else back.get(name, name)),
        {VERSIONS: known[:-1] if len(known) > 2 else None},
        sign,
    )


def versions(bundle: Bundle, support: Prototypes | None = None) -> list[dict[str, Any]]:
    """List what was enrolled when, the oldest first; the last is what answers.

    Args:
        bundle: as it was opened.
        support: of the bundle, where it has been read.
    """
    if VERSIONS in bundle.manifest:
        return list(bundle.manifest[VERSIONS])
    exported = support or Prototypes.from_files(
        bundle.read(TENSORS), bundle.read(FACTS), encoder_sha256=bundle.encoder_sha256
    )
    return [_version(1, bundle.manifest.get("created"), "exported", exported)]


def _version(number: int, created: str | None, what: str, support: Prototypes) -> dict[str, Any]:
    return {"version": number, "created": created, "what": what, "tiles": support.counts()}


def _kept(bundle: Bundle, renamed: Callable[[str], str | None]) -> dict[str, str]:
    """Name in the changed bundle of each file, to its name now."""
    names = {name: renamed(name) for name in bundle.manifest["files"]}
    return {new: old for old, new in names.items() if new is not None}


def _old(name: str, version: int) -> str:
    stem, _, suffix = name.partition(".")
    return f"{stem}-{version:04d}.{suffix}"
