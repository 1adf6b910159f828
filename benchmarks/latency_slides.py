"""The slide scenario of `latency.py`: tiles a second by stage, beside the limits, and memory.

Slides are made here: JPEG pyramids with a round piece of tissue. Their segments repeat a few dozen
pictures, so that they are made in seconds; each is decoded anew wherever it stands.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from latency_parts import PEAK, Subject, run_module, timed_process
from numpy.typing import NDArray
from PIL import Image
from timing import Times, interleaved, ratio

from cdt_runtime.backends import open_session
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.reading import open_slide
from cdt_runtime.slides.cutting import tiles_ahead
from cdt_runtime.slides.job import Plan, classify_slide, plan_slide
from cdt_runtime.slides.pyramid import Pyramid, open_pyramid
from cdt_runtime.slides.regions import Regions
from cdt_runtime.slides.stream import tile_batches

SIDE, LARGE, SMALL = 20_000, 60_000, 6_000
"""Pixels along the slide that is measured, the one that memory is compared on, and the one of
`--quick`."""

SEGMENT, STEP, MPP = 256, 4, 0.5
SHARE = {SIDE: 0.4, LARGE: 0.05, SMALL: 0.4}
"""How much of each slide is tissue."""

PICTURES = 32
RECIPE = (
    *("data.layout=image_folders", "training.folds=[1]", "training.num_folds=2"),
    *("training.ssl_epochs=1", "training.ssl_steps=1", "training.encoder_epochs=0"),
    *("training.num_epochs=1", "training.episodes_per_epoch=1", "training.eval_shots=[1]"),
    *("training.k_shot=1", "training.val_episodes=2", "training.test_episodes=2"),
)


def texture(seed: int) -> NDArray[np.uint8]:
    """A picture `(256, 256, 3)` in the colours of H&E: pink, with purple blots and grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((SEGMENT // 8, SEGMENT // 8)).repeat(8, axis=0).repeat(8, axis=1)
    blots = (coarse > 0.7)[:, :, None]
    colours = np.where(blots, (120.0, 70.0, 150.0), (226.0, 170.0, 205.0))
    grain = rng.normal(0.0, 9.0, (SEGMENT, SEGMENT, 1))
    return np.clip(colours + grain, 0, 255).astype(np.uint8)


@lru_cache
def _encoded(index: int) -> bytes:
    picture = np.full((SEGMENT, SEGMENT, 3), 244, np.uint8) if index < 0 else texture(index)
    data: bytes = imagecodecs.jpeg8_encode(picture, level=85)
    return data


def _segments(side: int, share: float) -> Iterator[bytes]:
    """The segments of a level, row by row: a disc of tissue in the middle, glass around it."""
    count = -(-side // SEGMENT)
    radius = side * np.sqrt(share / np.pi)
    middles = (np.arange(count) + 0.5) * SEGMENT - side / 2
    inside = np.hypot(middles[:, None], middles[None]) < radius
    for place, tissue in enumerate(inside.ravel()):
        yield _encoded(place % PICTURES if tissue else -1)


def write_slide(path: Path, side: int, share: float) -> None:
    """Write a tiled JPEG pyramid in RGB, each level a fourth as wide as the one before."""
    part = path.with_suffix(".partial")
    with tifffile.TiffWriter(part, bigtiff=True) as file:
        length = side
        while length >= 2 * SEGMENT:
            file.write(
                _segments(length, share),
                shape=(length, length, 3),
                dtype=np.uint8,
                photometric="rgb",
                compression="jpeg",
                tile=(SEGMENT, SEGMENT),
                subfiletype=0 if length == side else 1,
                resolution=(1e4 / MPP * length / side,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            length //= STEP
    part.rename(path)


def prepare_bundle(work: Path, ct: Path) -> Path:
    """Make a model of RGB tiles that has seen next to nothing, and its bundle."""
    tiles, model, bundle = (work / f"slide_{name}" for name in ("tiles", "model", "bundle"))
    if not tiles.is_dir():
        part = work / "slide_tiles.partial"
        shutil.rmtree(part, ignore_errors=True)
        for index in range(24):
            folder = part / "train" / ("stroma" if index % 2 else "tumor")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(texture(index)).save(folder / f"{index}.png")
        part.rename(tiles)
    if not (model / "best_model.pt").is_file():
        words = ("--data-dir", tiles, "--ct-dir", ct, "--output-dir", model)
        run_module("cdt_train.cli", *words, *RECIPE)
    if not (bundle / "bundle.json").is_file():
        words = ("--checkpoint", model / "best_model.pt", "--output", bundle, "--data-dir", tiles)
        run_module("cdt_export.cli", *words)
    return bundle


def slide(subject: Subject) -> dict[str, Any]:
    """A slide to its table of tiles: by stage, beside bare inference and libjpeg-turbo."""
    work = subject.bundle.parent
    bundle = prepare_bundle(work, subject.ct)
    side = SMALL if subject.quick else SIDE
    path = _made(work, side)
    classifier = FewShotClassifier.open(bundle)
    context = classifier.context(None)
    with open_slide(path) as opened, open_pyramid(path) as pyramid:
        plan = plan_slide(opened, classifier.preprocess, mpp=MPP, fill_missing=False)
        reading = interleaved(
            {
                "libjpeg-turbo": lambda _: _decode_all(plan, pyramid),
                "regions": lambda _: _cut_all(plan, pyramid),
            },
            subject.rounds(7, 3),
            warmup=1,
        )
        batches = list(_batches(plan, classifier, limit=4))
    count = len(plan.places)
    session = open_session(
        classifier.backend, classifier.bundle.read("tile_classifier.onnx"), classifier.precision
    )
    inputs = {
        "ct_tokens": context.tokens,
        "ct_present": context.present,
        "prototypes": classifier.class_prototypes(context),
        "scale": np.array([classifier.prototypes.scale], np.float32),
    }

    def engine(_: int) -> None:
        for turn in range(-(-count // classifier.batch_size)):
            session.run({"tile": batches[turn % len(batches)], **inputs})

    def whole(turn: int) -> None:
        out = work / "slide.cdt"
        shutil.rmtree(out, ignore_errors=True)
        classify_slide(classifier, path, context, out, mpp=MPP)

    times = interleaved({"end to end": whole, "engine": engine}, subject.rounds(5, 2), warmup=1)
    return {
        "on": classifier.engine,
        "side": side,
        "tiles": count,
        "tile_pixels": round(plan.grid.side),
        "reading": {name: one.facts() for name, one in reading.items()},
        "reading_share_of_libjpeg": _cpu_ratio(reading["libjpeg-turbo"], reading["regions"]),
        "tiles_a_second": {name: count / one.p50 * 1e3 for name, one in times.items()},
        "tiles_a_second_range": {
            name: [count / max(one.wall) * 1e3, count / min(one.wall) * 1e3]
            for name, one in times.items()
        },
        "share_of_engine": ratio(times["engine"], times["end to end"]),
        "memory": _memory(work, bundle, (side,) if subject.quick else (SIDE, LARGE)),
    }


def _made(work: Path, side: int) -> Path:
    path = work / f"slide_{side}.tif"
    if not path.is_file():
        write_slide(path, side, SHARE[side])
    return path


def _cpu_ratio(first: Times, second: Times) -> float:
    """How many times the CPU time the first took, by its least round: both use every core."""
    return min(first.cpu) / min(second.cpu)


def _decode_all(plan: Plan, pyramid: Pyramid) -> None:
    """Decode what the tiles lie on, each segment once, with the library alone."""
    page = pyramid.levels[plan.grid.level.index].pages[0]
    across = -(-page.width // SEGMENT)
    for row, column in _needed(plan):
        imagecodecs.jpeg8_decode(_encoded((row * across + column) % PICTURES))


def _needed(plan: Plan) -> list[tuple[int, int]]:
    """Rows and columns of the segments that tiles of tissue lie on."""
    found = set()
    for row, column in plan.places.tolist():
        box = plan.grid.box(row, column)
        for down in range(box.top // SEGMENT, -(-(box.top + box.height) // SEGMENT)):
            for over in range(box.left // SEGMENT, -(-(box.left + box.width) // SEGMENT)):
                found.add((down, over))
    return sorted(found)


def _cut_all(plan: Plan, pyramid: Pyramid) -> None:
    """Read the pixels of every tile, as the job does, and do nothing with them."""
    level = pyramid.levels[plan.grid.level.index]
    with Regions(level, plan.reading.glass) as regions:
        for box in tiles_ahead(regions, plan.grid.side, plan.places):
            regions.read(box)


def _batches(plan: Plan, classifier: FewShotClassifier, limit: int) -> Iterator[NDArray[Any]]:
    size = classifier.batch_size
    made = tile_batches(
        plan.slide,
        plan.grid,
        plan.places[: limit * size],
        classifier.preprocess,
        plan.reading,
        size,
    )
    yield from (batch.tiles for batch in made if batch.tiles is not None)


def _memory(work: Path, bundle: Path, sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak memory of the command on slides of several sizes, each in a process of its own."""
    found = []
    for side in sides:
        out = work / "slide_memory.cdt"
        shutil.rmtree(out, ignore_errors=True)
        line = (
            *(sys.executable, "-c", f"{PEAK}from cdt_runtime.cli import infer; infer()"),
            *("--no-ct", str(_made(work, side)), "--slide", "--mpp", str(MPP), "--json"),
            *("--out", str(out), "--bundle", str(bundle)),
        )
        took, peak, said = timed_process(line, work / "cache")
        tiles = json.loads(said)["tiles"]
        found.append({"side": side, "tiles": tiles, "wall_ms": took, "peak_mib": peak})
    return found
