"""What `cdt-infer` does: tiles, a slide or a table of patients, and what it prints of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cdt_runtime import report
from cdt_runtime.audit import AuditLog, of_answer, of_slide
from cdt_runtime.bundle import newest_bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.console import one_line, say
from cdt_runtime.errors import InputError
from cdt_runtime.files import write_synced
from cdt_runtime.infer_asked import Asked
from cdt_runtime.prediction import Context, Prediction, TileInput
from cdt_runtime.reading import scan_series
from cdt_runtime.sandbox.process import SANDBOX
from cdt_runtime.tile_folder import tiles_under
from cdt_runtime.tile_input import require_filling
from cdt_runtime.tile_stream import Failure, answers, read_ahead

if TYPE_CHECKING:
    from cdt_runtime.dicom_report import ClassCode, References


def run_asked(asked: Asked) -> int:
    """Do what was asked for; return the exit code.

    Raises:
        CdtError: it can't be done; the message says why.
    """
    asked.check()
    ct_dir, tiles = (None, ()) if asked.manifest else asked.split_paths()
    codes = _codes(asked)
    _require_parts(asked)
    log = AuditLog(Path(asked.audit)) if asked.audit else None
    SANDBOX.start()  # it gets ready while the bundle is opened
    classifier = _open(asked)
    if asked.fill_missing:
        require_filling(classifier.preprocess)
    if asked.manifest:
        return _cohort(asked, classifier, Path(asked.manifest), log)
    context = classifier.context(
        ct_dir, series_uid=asked.series, allow_resample=asked.allow_resample
    )
    if asked.coverage and (note := classifier.certificate(_counted(classifier, context)).note):
        click.echo(f"note: {note}", err=True)
    run = _Run(asked, classifier, context, Path(ct_dir) if ct_dir else None, log, codes)
    return run.slide(Path(tiles[0])) if asked.as_slide else run.tiles(tiles)


def _codes(asked: Asked) -> dict[str, ClassCode]:
    if not asked.codes:
        return {}
    from cdt_runtime.dicom_report import read_codes

    return read_codes(Path(asked.codes))


def _require_parts(asked: Asked) -> None:
    """Missing, it must be said before hours of work."""
    if asked.dicom_sr:
        import highdicom  # noqa: F401
    if asked.embeddings:
        from cdt_runtime.anndata_file import check_target

        check_target(Path(asked.embeddings))
    if asked.parquet:
        import pyarrow  # noqa: F401
    if asked.as_slide:
        import tifffile  # noqa: F401


def _open(asked: Asked) -> FewShotClassifier:
    path = Path(asked.bundle) if asked.bundle else newest_bundle(Path("engines"))
    if not asked.bundle:
        click.echo(f"bundle: {path} (the newest; --bundle chooses another)", err=True)
    classifier = FewShotClassifier.open(
        path,
        backend=asked.backend,
        precision=asked.precision,
        tta=asked.tta,
        coverage=asked.coverage,
        trust=Path(asked.trust) if asked.trust else None,
    )
    for note in classifier.notes:
        click.echo(f"note: {one_line(note)}", err=True)
    return classifier


def _counted(classifier: FewShotClassifier, context: Context) -> Context:
    """The context that answers rest on."""
    return classifier.context(None) if classifier.prototypes.ct_off else context


def _cohort(
    asked: Asked, classifier: FewShotClassifier, manifest: Path, log: AuditLog | None
) -> int:
    """Answer a table of patients, write the results and print the summary."""
    from cdt_runtime import cohort

    options = cohort.Options(asked.reading, asked.z, asked.allow_resample, asked.no_ct, log)
    rows = cohort.read_manifest(manifest)
    folder = Path(asked.out) if asked.out else Path(f"{manifest.name.split('.')[0]}.cdt")
    answer = None
    if asked.ray:
        from cdt_runtime.cohort_ray import ray_rows

        opened = {
            "backend": classifier.backend,
            "precision": classifier.precision,
            "tta": classifier.tta,
        }
        answer = ray_rows(asked.ray, classifier.bundle.path, opened, options, folder)
    found = cohort.run_cohort(classifier, rows, options, folder, answer)
    files = [cohort.RESULTS, cohort.TABLE]
    if asked.parquet or asked.ray:
        from cdt_runtime.parquet import write_parquet

        files.append(write_parquet(folder / cohort.TABLE, cohort.TEXT_COLUMNS, ("row",)).name)
    for row in found:
        for why in cohort.failures_of(row):
            say(f"row {row['row']}: {why}")
    summary = {**cohort.summary_of(found), "out": str(folder), "files": files}
    click.echo(json.dumps(summary) if asked.as_json else cohort.as_text(summary))
    return InputError.exit_code if summary["failed_rows"] else 0


@dataclass(frozen=True, eq=False)
class _Run:
    """Answers about one patient.

    Attributes:
        asked: for.
        classifier: that answers.
        context: the CT's, or none.
        ct_dir: folder of the CT.
        log: that answers go into, too.
        codes: of classes, for a report.
    """

    asked: Asked
    classifier: FewShotClassifier
    context: Context
    ct_dir: Path | None
    log: AuditLog | None
    codes: Mapping[str, ClassCode]

    def slide(self, path: Path) -> int:
        """Classify a slide, write its files and print the summary; return the exit code."""
        from cdt_runtime.slides import results
        from cdt_runtime.slides.job import TABLE, classify_slide

        asked = self.asked
        folder = Path(asked.out) if asked.out else Path(f"{path.name.split('.')[0]}.cdt")
        found = classify_slide(self.classifier, path, self.context, folder, **asked.reading)
        summary = results.write_results(found, self.classifier, self.context, folder)
        if asked.parquet:
            from cdt_runtime.parquet import write_parquet

            made = write_parquet(folder / TABLE, ("label", "reason"), ("row", "column"))
            summary["files"].append(made.name)
        if self.log:
            self.log.append(of_slide(path, summary, self.classifier, self.context))
        self._report(summary, found.plan.slide.references)
        if asked.embeddings:
            from cdt_runtime.embeddings import write_slide_embeddings

            target = Path(asked.embeddings)
            write_slide_embeddings(
                target, self.classifier, path, self.context, found, **asked.reading
            )
            click.echo(f"embeddings: {target}", err=True)
        text = (
            json.dumps(summary, ensure_ascii=False) if asked.as_json else results.as_text(summary)
        )
        click.echo(text)
        if asked.card:
            from cdt_runtime.evidence.page import slide_page

            overview = (folder / results.OVERVIEW).read_bytes()
            _write_page(Path(asked.card), slide_page(summary, overview))
        for tile in found.unreadable[:1]:
            count = len(found.unreadable)
            say(f"{path.name}: {count} tiles can't be read, the first: {tile.reason}")
        return InputError.exit_code if found.unreadable else 0

    def tiles(self, given: Sequence[str]) -> int:
        """Classify tiles and print the answers; return the exit code."""
        asked, expected = self.asked, self.classifier.preprocess.channels
        # The tiles of a folder stand in its place.
        tiles = [one for tile in given for one in tiles_under(tile, expected, asked.names)]
        if asked.card and len(tiles) != 1:
            raise InputError(f"--card with {len(tiles)} tiles: give one at a time")
        reading = {**asked.reading, "z": asked.z}
        code = self._classify(tiles, reading)
        if asked.card and not code:
            self._write_card(tiles[0], reading, Path(asked.card))
        return code

    def _classify(self, tiles: Sequence[str], reading: Mapping[str, Any]) -> int:
        """Print an answer or an error for each tile, in the order given."""
        asked, classifier = self.asked, self.classifier
        inputs: Iterable[TileInput | Failure]
        inputs = read_ahead(classifier, tiles, report.distinct_names(tiles), reading)
        if asked.transductive:  # all are read into memory first
            inputs = list(inputs)
            usable = [one for one in inputs if not isinstance(one, Failure)]
            used = classifier.transduce(usable, self.context)
            click.echo(f"note: classes drawn towards {used} tiles", err=True)
        embedded = None
        if asked.embeddings:
            from cdt_runtime.embeddings import Embedded

            embedded = Embedded(classifier, self.context)
            inputs = embedded.passing(inputs)
        code, last = 0, None
        told: list[Prediction] = []
        outcomes: Counter[str] = Counter()
        for answer in answers(classifier, inputs, self.context):
            if self.log:  # what was not logged is not said
                self.log.append(of_answer(answer, classifier, self.context))
            if isinstance(answer, Failure):
                code = answer.error.exit_code
                outcomes["unreadable"] += 1
                say(answer.error)
                if asked.as_json:
                    click.echo(report.failure_as_json(answer.tile, one_line(answer.error)))
                continue
            last = answer
            if embedded is not None:
                embedded.add(answer)
            told += [answer] if asked.dicom_sr else []
            outcomes[(answer.reason or "answered").split(":")[0]] += 1
            as_text = report.as_text(answer)
            click.echo(report.as_json(answer, classifier) if asked.as_json else as_text)
        if last is not None and not asked.as_json:
            click.echo("\n" + report.context_text(classifier, last, outcomes))
        if told:
            self._report(told, ())
        if embedded is not None:
            embedded.write(Path(str(asked.embeddings)))
            click.echo(f"embeddings: {asked.embeddings}", err=True)
        return code

    def _report(self, answer: Sequence[Prediction] | Mapping[str, Any], slide: References) -> None:
        """Write the structured report, where one was asked for."""
        if not self.asked.dicom_sr:
            return
        from cdt_runtime.dicom_report import write_report

        path = Path(self.asked.dicom_sr)
        write_report(path, self.classifier, answer, self._ct_references(), slide, self.codes)
        click.echo(f"report: {path}", err=True)

    def _ct_references(self) -> References:
        if self.ct_dir is None:
            return ()
        return scan_series(
            self.ct_dir,
            series_uid=self.asked.series,
            min_slices=self.classifier.preprocess.min_slices,
            allow_resample=self.asked.allow_resample,
        ).references()

    def _write_card(self, tile: str, reading: Mapping[str, Any], path: Path) -> None:
        """Write the page of evidence of one tile."""
        from cdt_runtime.evidence.found import find_evidence
        from cdt_runtime.evidence.page import tile_page

        ct_dir, classifier = self.ct_dir, self.classifier

        def read_ct() -> Any:
            assert ct_dir is not None
            asked = self.asked
            return classifier.contexts.input_of_folder(ct_dir, asked.series, asked.allow_resample)

        name = report.distinct_names([tile])[0]
        read = replace(classifier.read(tile, **reading), name=name)
        found = find_evidence(classifier, read, self.context, read_ct if ct_dir else None)
        _write_page(path, tile_page(found, classifier))


def _write_page(path: Path, page: str) -> None:
    try:
        write_synced(path, page.encode())
    except OSError as error:
        raise InputError(f"--card {path}: can't be written ({error.strerror})") from error
    click.echo(f"card: {path}", err=True)
