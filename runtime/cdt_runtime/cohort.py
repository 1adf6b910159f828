"""Many patients from one table: a row at a time, each kept as soon as it is done.

    manifest.csv   patient, ct_dir, tiles or slide
    OUT/results.jsonl        a JSON object a row, in the table's order; once all are done
    OUT/results.partial.jsonl  the same while they come, each written whole
    OUT/answers.csv          a line a tile, for spreadsheets; answers.parquet the same on request
    OUT/slides/ROW/          what a slide gives

What a row gives hangs on its inputs, the bundle and the engine alone: no time, and nothing of what
a cache held.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdt_runtime.audit import AuditLog, of_answer, of_slide
from cdt_runtime.bundle import sha256
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import InputError
from cdt_runtime.files import replace_synced
from cdt_runtime.progress import Progress
from cdt_runtime.report import NOTICE, as_record, distinct_names
from cdt_runtime.tiff_meta import Z
from cdt_runtime.tile_folder import tiles_under
from cdt_runtime.tile_stream import Failure, answers, read_ahead

STATE, GROWING, RESULTS, TABLE = (
    "cohort.json",
    "results.partial.jsonl",
    "results.jsonl",
    "answers.csv",
)
TEXT_COLUMNS = ("patient", "tile", "label", "reason", "error")
"""Of `TABLE`, those that hold text."""
COLUMNS = ("patient", "ct_dir", "tiles", "slide")
MAX_BYTES = 64 << 20
MAX_ROWS = 1_000_000
BETWEEN = ";"
"""Between several paths in one cell."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        number: in the table, from 1.
        patient: as the table calls them.
        ct_dir: folder of the CT; None for none.
        tiles: files and folders; none where there is a slide.
        slide: file; None where there are tiles.
        key: hash of what the cells say; tells the row from others, wherever in the table it stands.
    """

    number: int
    key: str
    patient: str
    ct_dir: Path | None
    tiles: tuple[Path, ...]
    slide: Path | None


@dataclass(frozen=True, eq=False)
class Options:
    """How rows are read.

    Attributes:
        reading: of tiles and slides: channels, fill_missing, mpp.
        z: of tiles, as `read_tile` takes it.
        allow_resample: of CT.
        no_ct: leave the CT out.
        log: that answers go into, too.
    """

    reading: Mapping[str, Any]
    z: Z
    allow_resample: bool
    no_ct: bool
    log: AuditLog | None = None


def read_manifest(path: Path) -> list[Row]:
    """Read the table; its paths are meant from its own folder.

    Raises:
        InputError: it can't be read; the row and column are named.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--manifest {path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--manifest {path.name}: is not UTF-8 text: save it as CSV") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"--manifest {path.name}: is over {MAX_BYTES >> 20} MiB: cut it up")
    try:
        lines = csv.DictReader(io.StringIO(text), strict=True)
        known = set(lines.fieldnames or ())
        _check_columns(path, known)
        rows = [_row(path, number, line) for number, line in enumerate(lines, start=1)]
    except csv.Error as error:
        raise InputError(f"--manifest {path.name}: is no CSV ({error}): save it again") from error
    if not 0 < len(rows) <= MAX_ROWS:
        raise InputError(f"--manifest {path.name}: {len(rows)} rows, expected 1 to {MAX_ROWS}")
    return rows


def _check_columns(path: Path, known: set[str]) -> None:
    odd = sorted(known - set(COLUMNS))
    if "patient" not in known or not known & {"tiles", "slide"} or odd:
        raise InputError(
            f"--manifest {path.name}: columns {', '.join(sorted(known)) or '(none)'}: expected "
            f"patient, tiles or slide, and for a CT ct_dir"
        )


def _row(path: Path, number: int, line: Mapping[Any, Any]) -> Row:
    cells = {name: (line.get(name) or "").strip() for name in COLUMNS}
    if None in line or None in line.values():
        raise InputError(f"--manifest {path.name} row {number}: has more or fewer cells than names")
    if not cells["patient"] or bool(cells["tiles"]) == bool(cells["slide"]):
        raise InputError(
            f"--manifest {path.name} row {number}: expected a patient, and tiles or a slide"
        )
    home = path.parent.absolute()
    return Row(
        number,
        sha256(json.dumps(cells).encode()),
        cells["patient"],
        home / cells["ct_dir"] if cells["ct_dir"] else None,
        tuple(home / one.strip() for one in cells["tiles"].split(BETWEEN) if one.strip()),
        home / cells["slide"] if cells["slide"] else None,
    )


def classify_row(
    classifier: FewShotClassifier, row: Row, options: Options, out: Path
) -> dict[str, Any]:
    """Answer one row; what is wrong with it is told in its place.

    Args:
        classifier: to ask.
        row: of the table.
        options: how it is read.
        out: folder of the cohort's results.

    Returns:
        What `results.jsonl` says of it.
    """
    found: dict[str, Any] = {"row": row.number, "patient": row.patient, "key": row.key}
    try:
        ct = None if options.no_ct else row.ct_dir
        context = classifier.context(ct, allow_resample=options.allow_resample)
        if row.slide is not None:
            return found | {"slide": _slide(classifier, row, context, options, out)}
        return found | {"tiles": list(_tiles(classifier, row, context, options))}
    except InputError as error:
        return found | {"error": " ".join(str(error).split())}


def _tiles(
    classifier: FewShotClassifier, row: Row, context: Any, options: Options
) -> Iterator[dict[str, Any]]:
    expected, named = classifier.preprocess.channels, options.reading["channels"]
    paths = [one for path in row.tiles for one in tiles_under(str(path), expected, named)]
    inputs = read_ahead(
        classifier, paths, distinct_names(paths), {**options.reading, "z": options.z}
    )
    for answer in answers(classifier, inputs, context):
        if options.log:
            options.log.append(of_answer(answer, classifier, context))
        if isinstance(answer, Failure):
            yield {"tile": answer.tile, "error": " ".join(str(answer.error).split())}
            continue
        record = as_record(answer, classifier)
        record.pop("timings_ms")
        if record["ct"]:
            record["ct"].pop("cache_hit")
        yield record


def _slide(
    classifier: FewShotClassifier, row: Row, context: Any, options: Options, out: Path
) -> dict[str, Any]:
    from cdt_runtime.slides.job import classify_slide
    from cdt_runtime.slides.results import write_results

    assert row.slide is not None
    folder = out / "slides" / row.key[:16]
    found = classify_slide(classifier, row.slide, context, folder, **options.reading)
    summary = write_results(found, classifier, context, folder)
    if options.log:
        options.log.append(of_slide(row.slide, summary, classifier, context))
    summary["out"] = f"slides/{folder.name}"
    summary.pop("resumed")
    if summary["ct"]:
        summary["ct"].pop("cache_hit")
    return summary


class Cohort:
    """The folder of a cohort's results.

    Args:
        out: made where there is none; a run that was stopped there goes on.
        state: all that answers hang on but for the rows.

    Raises:
        InputError: the folder can't be made, or holds the results of something else.
    """

    def __init__(self, out: Path, state: Mapping[str, Any]) -> None:
        self._out = out
        kept = out / STATE
        content = json.dumps(state, indent=1, sort_keys=True).encode() + b"\n"
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                replace_synced(kept, content)
            same = kept.read_bytes() == content
        except OSError as error:
            raise InputError(
                f"--out {out}: can't be used ({error.strerror}): give another folder"
            ) from error
        if not same:
            raise InputError(
                f"--out {out}: holds results of another bundle, engine or options: give another "
                "folder"
            )

    def done(self) -> dict[str, dict[str, Any]]:
        """Return what is known of rows that had no error, by key; a torn last line is cut off."""
        found: dict[str, dict[str, Any]] = {}
        for name in (RESULTS, GROWING):
            path = self._out / name
            if not path.exists():
                continue
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if name == GROWING and len(whole) < len(data):
                replace_synced(path, whole)
            lines = [json.loads(line) for line in whole.splitlines()]
            found |= {line["key"]: line for line in lines if not has_failed(line)}
        return found

    def keep(self, found: Mapping[str, Any]) -> None:
        """Write what a row gave, and wait until it is on the disk."""
        with (self._out / GROWING).open("ab") as file:
            file.write(_line(found))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, found: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
        """Write all rows in their order, and the table of tiles."""
        replace_synced(self._out / RESULTS, b"".join(map(_line, found)))
        replace_synced(self._out / TABLE, _table(found, classes).encode())
        (self._out / GROWING).unlink(missing_ok=True)


def _line(found: Mapping[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def has_failed(found: Mapping[str, Any]) -> bool:
    """Whether a row, or a tile of it, could not be used."""
    if "slide" in found:
        return bool(found["slide"]["unreadable"])
    return "error" in found or any("error" in tile for tile in found["tiles"])


def state_of(classifier: FewShotClassifier, options: Options) -> dict[str, Any]:
    """All that the answers of rows hang on."""
    return {
        "bundle": classifier.bundle.manifest_sha256,
        "engine": [classifier.engine, classifier.precision, classifier.tta, classifier.coverage],
        "reading": {**options.reading, "z": options.z},
        "ct": [options.allow_resample, options.no_ct],
    }


Answer = Callable[[Sequence[Row]], Iterable[dict[str, Any]]]
"""Answers rows, in any order."""


def run_cohort(
    classifier: FewShotClassifier,
    rows: Sequence[Row],
    options: Options,
    out: Path,
    answer: Answer | None = None,
) -> list[dict[str, Any]]:
    """Answer all rows, but for those that an earlier run had done.

    Args:
        classifier: to ask, and whose engine the results name.
        rows: of the table.
        options: how they are read.
        out: folder of the results.
        answer: what answers them in the classifier's place, by `classify_row`.

    Returns:
        What each gave, in the table's order.

    Raises:
        InputError: `out` can't be used.
    """
    cohort = Cohort(out, state_of(classifier, options))
    known = cohort.done()
    waiting = [row for row in rows if row.key not in known]
    progress = Progress("rows", len(rows), len(rows) - len(waiting))
    one_by_one = (classify_row(classifier, row, options, out) for row in waiting)
    for found in answer(waiting) if answer and waiting else one_by_one:
        cohort.keep(found)
        known[found["key"]] = found
        progress.add(1)
    progress.close()
    ordered = [{**known[row.key], "row": row.number} for row in rows]
    cohort.finish(ordered, classifier.classes)
    return ordered


def summary_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count what a cohort came to."""
    tiles = [tile for row in found for tile in row.get("tiles", ())]
    reasons = Counter(
        tile["reason"].split(":")[0] for tile in tiles if tile.get("reason") is not None
    )
    return {
        "rows": len(found),
        "failed_rows": [row["row"] for row in found if has_failed(row)],
        "slides": sum("slide" in row for row in found),
        "tiles": len(tiles),
        "unreadable_tiles": sum("error" in tile for tile in tiles),
        "labels": dict(Counter(tile["label"] for tile in tiles if tile.get("label"))),
        "reasons": dict(reasons),
    }


def as_text(summary: Mapping[str, Any]) -> str:
    """Return what a person reads of a cohort."""
    failed = summary["failed_rows"]
    lines = [
        f"{summary['rows']} rows, {len(failed)} of them with something that could not be used",
        f"{summary['tiles']} tiles and {summary['slides']} slides",
    ]
    counted = {**summary["labels"], **summary["reasons"]}
    if summary["unreadable_tiles"]:
        counted["unreadable"] = summary["unreadable_tiles"]
    width = max(map(len, counted), default=0)
    lines += [f"    {name:<{width}}  {count:>7}" for name, count in counted.items()]
    return "\n".join(
        [*lines, "", f"written   {summary['out']}: {', '.join(summary['files'])}", NOTICE]
    )


def failures_of(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row, a line each."""
    if "error" in row:
        return [row["error"]]
    if "slide" in row:
        count = row["slide"]["unreadable"]
        return [f"{count} tiles of the slide can't be read"] if count else []
    return [tile["error"] for tile in row["tiles"] if "error" in tile]


def _table(found: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    """A line a tile; of a slide one with the mean of its tiles."""
    text = io.StringIO()
    names = [f"p_{name}" for name in classes]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "patient", "tile", "label", "reason", *names, "error"])
    for row in found:
        head = [row["row"], row["patient"]]
        if "error" in row:
            writer.writerow([*head, "", "", "", *[""] * len(names), row["error"]])
        elif "slide" in row:
            means = row["slide"]["mean_probabilities"] or {}
            chances = [means.get(name, "") for name in classes]
            writer.writerow([*head, row["slide"]["slide"], "", "", *chances, ""])
        for tile in row.get("tiles", ()):
            chances = [tile.get("probabilities", {}).get(name, "") for name in classes]
            told = [tile.get("label") or "", tile.get("reason") or ""]
            writer.writerow([*head, tile["tile"], *told, *chances, tile.get("error", "")])
    return text.getvalue()
