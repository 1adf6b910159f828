"""A whole slide from file to results, taken up again where it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import InputError, TileError, naming
from cdt_runtime.files import write_synced
from cdt_runtime.prediction import Context
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.progress import Progress
from cdt_runtime.reading import Slide, level_for, open_slide
from cdt_runtime.slides.ahead import ahead
from cdt_runtime.slides.dicom_wsi import slide_files
from cdt_runtime.slides.grid import Grid, grid_of, reading_order, tissue_shares
from cdt_runtime.slides.stream import Batch, Float, Place, Reading, tile_batches
from cdt_runtime.slides.table import BLANK, LOW, TileAnswer, TileTable
from cdt_runtime.slides.tissue import Small, tissue_mask
from cdt_runtime.tile import RGB, channel_places

STATE, GROWING, TABLE = "slide.json", "tiles.partial.csv", "tiles.csv"
AHEAD = 2
"""Batches that wait for the engine; more would only cost memory."""

ENLARGED = 1.5
"""From this factor on a slide that is too coarse for the model is said to be."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A slide, opened, with all that is decided before its first tile.

    Attributes:
        slide: open.
        grid: of tiles.
        reading: how its samples become tile inputs.
        microns: along a tile.
        small: copy of the slide.
        shares: `(rows, columns)` share of tissue.
        places: `(n, 2)` tiles with tissue, in reading order.
        warnings: one line each.
    """

    slide: Slide
    grid: Grid
    reading: Reading
    microns: float
    small: Small
    shares: NDArray[np.float32]
    places: NDArray[np.int64]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SlideAnswers:
    """What is known of a slide when all its tiles are done.

    Attributes:
        plan: of the slide.
        answers: one a tile with tissue.
        resumed: how many of them an earlier run had found.
    """

    plan: Plan
    answers: tuple[TileAnswer, ...]
    resumed: int

    def counts(self, classes: Sequence[str]) -> dict[str, int]:
        """Tiles of each class, in the classes' order."""
        found = Counter(one.label for one in self.answers)
        return {name: found[name] for name in classes}

    @property
    def unreadable(self) -> tuple[TileAnswer, ...]:
        """Tiles of parts of the file that are damaged."""
        return tuple(one for one in self.answers if not one.chances)


def plan_slide(
    slide: Slide, preprocess: Preprocess, *, mpp: float | None, fill_missing: bool
) -> Plan:
    """Decide which tiles of a slide are looked at.

    Args:
        slide: open.
        preprocess: of the model.
        mpp: microns a pixel of the tile input; None takes that of the training tiles.
        fill_missing: fill a channel that the slide lacks with zeros.

    Raises:
        TileError: the scale is not known, the slide is smaller than a tile, or lacks a channel.
    """
    with naming(slide.source):
        wanted, finest, notes = _scales(slide, preprocess, mpp)
        places = channel_places(slide.channels, preprocess.channels, fill_missing=fill_missing)
        level = level_for(slide, wanted, finest)
        microns = wanted * preprocess.image_size
        grid = grid_of(level, finest * level.downsample, microns)
        glass = 255 if slide.channels == RGB and slide.bits == 8 else 0
        small = slide.small_copy(glass)
    shares = tissue_shares(grid, tissue_mask(small, slide.channels), small)
    reading = Reading(tuple(places.values()), slide.bits, glass, slide.source)
    return Plan(
        slide,
        grid,
        reading,
        microns,
        small,
        shares,
        reading_order(shares),
        (*slide.warnings, *notes),
    )


def classify_slide(
    classifier: FewShotClassifier,
    path: Path,
    context: Context,
    out: Path,
    *,
    mpp: float | None = None,
    channels: Sequence[str] | None = None,
    fill_missing: bool = False,
) -> SlideAnswers:
    """Classify every tile of a slide that shows tissue, and keep each answer as it comes.

    Args:
        classifier: to ask.
        path: of the slide.
        context: of the patient's CT.
        out: folder of the results; a run that was stopped there goes on.
        mpp: microns a pixel of the tile input; None takes that of the training tiles.
        channels: names for the channels of a file that has none.
        fill_missing: fill a channel that the slide lacks with zeros.

    Raises:
        TileError: the slide can't be used.
        InputError: `out` holds the results of something else.
    """
    if classifier.prototypes.ct_off:
        context = classifier.context(None)
    with open_slide(path, channels) as slide:
        plan = plan_slide(slide, classifier.preprocess, mpp=mpp, fill_missing=fill_missing)
        state = _state(classifier, path, context, plan)
        table = TileTable(out / GROWING, plan.grid, classifier.classes)
        answers = _taken_up(out, state, table, plan, classifier)
        resumed = len(answers)
        progress = Progress("tiles", len(plan.places), resumed)
        for batch in _batches(classifier, plan, resumed):
            found = _answers(classifier, batch, context, plan)
            table.append(found)
            answers += found
            progress.add(len(found))
        progress.close()
    if (out / GROWING).exists():
        table.finish(answers, out / TABLE)
    return SlideAnswers(plan, tuple(answers), resumed)


def embed_slide(
    classifier: FewShotClassifier,
    path: Path,
    context: Context,
    *,
    mpp: float | None = None,
    channels: Sequence[str] | None = None,
    fill_missing: bool = False,
) -> Iterator[tuple[tuple[Place, ...], Float]]:
    """Embed every tile of a slide that shows tissue and can be read; the slide is read for it.

    Args: as `classify_slide`.

    Yields:
        Row and column of some tiles, and their embeddings `(B, E)`.
    """
    if classifier.prototypes.ct_off:
        context = classifier.context(None)
    with open_slide(path, channels) as slide:
        plan = plan_slide(slide, classifier.preprocess, mpp=mpp, fill_missing=fill_missing)
        progress = Progress("tiles", len(plan.places), 0)
        for batch in _batches(classifier, plan, 0):
            progress.add(len(batch.places) + len(batch.failures))
            if batch.tiles is not None:
                features = classifier.hear(batch.images, len(batch.places))
                yield batch.places, classifier.embed_arrays(batch.tiles, context, features)
        progress.close()


def _scales(
    slide: Slide, preprocess: Preprocess, mpp: float | None
) -> tuple[float, float, list[str]]:
    """Microns a pixel of the tile input and of the finest level; and what to say of them."""
    wanted, notes = mpp or preprocess.tile_mpp, []
    if wanted is None:
        raise TileError(
            "the model does not know at what scale it was trained: give the microns a pixel of its "
            "training tiles with --mpp"
        )
    if mpp and preprocess.tile_mpp and not 1 / ENLARGED <= mpp / preprocess.tile_mpp <= ENLARGED:
        notes.append(f"--mpp {mpp:g}, trained at {preprocess.tile_mpp:.2f}")
    finest = slide.mpp
    if finest is None:
        notes.append(f"no resolution in the file: its finest level is taken to have {wanted:g}")
        finest = wanted
    if finest > ENLARGED * wanted:
        notes.append(
            f"its finest level has {finest:.2f} microns a pixel, {wanted:.2f} are asked for: tiles "
            "are enlarged"
        )
    return wanted, finest, notes


def _state(
    classifier: FewShotClassifier, path: Path, context: Context, plan: Plan
) -> dict[str, Any]:
    """All that the answers hang on."""
    facts = [file.stat() for file in slide_files(path)]
    size, changed = sum(one.st_size for one in facts), max(one.st_mtime_ns for one in facts)
    return {
        "slide": [path.name, size, changed],
        "bundle": classifier.bundle.identity,
        "engine": [classifier.engine, classifier.precision, classifier.tta],
        "ct": context.key,
        "grid": [plan.grid.rows, plan.grid.columns, round(plan.grid.full_side, 6)],
        "channels": list(plan.reading.order),
        "tiles": len(plan.places),
    }


def _taken_up(
    out: Path, state: dict[str, Any], table: TileTable, plan: Plan, classifier: FewShotClassifier
) -> list[TileAnswer]:
    """Begin in an empty folder, or take up what an earlier run of the same found.

    Raises:
        InputError: the folder can't be made, or holds the results of something else.
    """
    kept = out / STATE
    if not kept.exists():
        _make(out)
        table.begin()
        write_synced(kept, json.dumps(state, indent=1).encode())
        return []
    try:
        same = json.loads(kept.read_text("utf-8")) == state
    except ValueError:
        same = False
    if not same:
        raise InputError(
            f"--out {out}: holds results of another slide, bundle, CT or scale: give another folder"
        )
    if (out / TABLE).exists():
        return TileTable(out / TABLE, plan.grid, classifier.classes).resumed()
    if not (out / GROWING).exists():
        table.begin()
    return table.resumed()


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out}: can't be made ({error.strerror}): give another folder"
        ) from error


def _batches(classifier: FewShotClassifier, plan: Plan, done: int) -> Iterator[Batch]:
    """Read the rest of the tiles ahead of the engine."""
    batches = tile_batches(
        plan.slide,
        plan.grid,
        plan.places[done:],
        classifier.preprocess,
        plan.reading,
        classifier.batch_size,
        classifier.encoders,
        classifier.prototypes.adaptation,
    )
    with closing(ahead(batches, AHEAD)) as made:
        yield from made


def _answers(
    classifier: FewShotClassifier, batch: Batch, context: Context, plan: Plan
) -> list[TileAnswer]:
    found = [
        TileAnswer(row, column, float(plan.shares[row, column]), None, why, ())
        for (row, column), why in batch.failures
    ]
    if batch.tiles is None:
        return found
    said = classifier.hear(batch.images, len(batch.tiles))
    chances, _ = classifier.classify(batch.tiles, context, said)
    blank = [classifier.preprocess.is_blank(tile) for tile in batch.tiles]
    looks = classifier.looks(batch.statistics)
    least = classifier.prototypes.min_confidence
    for (row, column), each, empty, look in zip(batch.places, chances, blank, looks, strict=True):
        best = int(each.argmax())
        reason = BLANK if empty else look.word or (None if each[best] >= least else LOW)
        label = None if reason else classifier.classes[best]
        share = float(plan.shares[row, column])
        found.append(TileAnswer(row, column, share, label, reason, tuple(map(float, each))))
    return found
