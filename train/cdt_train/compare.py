"""Does a pretraining help? From scratch, from each set of weights, and from the same permuted.

Every arm has the same splits, seeds, batches and budget of steps. Weights permuted within each
tensor keep the scale of the initialisation and lose what was learnt: what they gain over scratch is
no transfer, and only what the weights gain over them is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import CheckpointError
from cdt_train.checkpoint import write_json
from cdt_train.encoders.backbones import Backbone
from cdt_train.encoders.weights import Weights, load_backbone_weights, permuted
from cdt_train.engine import Engine
from cdt_train.finetune import Labelled, Mode, Plan, Tuning, fine_tune, report
from cdt_train.intervals import over_folds
from cdt_train.progress import say
from cdt_train.supervised_metrics import supervised_metrics, with_intervals

SCRATCH = "scratch"
SHOWN = ("auc", "accuracy")
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Arm:
    """One start of a backbone.

    Attributes:
        name: in the table.
        weights: of its network, or None for a random start.
        shuffled: permute them, by the seed of each run.
    """

    name: str
    weights: Weights | None = None
    shuffled: bool = False

    def start(self, backbone: Backbone, seed: int, adapt_stem: bool) -> Backbone:
        """Give a backbone the weights of this arm."""
        if self.weights is not None:
            weights = permuted(self.weights, seed) if self.shuffled else self.weights
            load_backbone_weights(backbone.net, weights, self.name, adapt_stem=adapt_stem)
        return backbone

    @property
    def identity(self) -> str:
        """A hash of the weights."""
        digest = hashlib.sha256(b"permuted" if self.shuffled else b"")
        for key, value in sorted((self.weights or {}).items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def arms_of(pretrained: Mapping[str, Weights]) -> list[Arm]:
    """Scratch, and each set of weights as it is and permuted."""
    arms = [Arm(SCRATCH)]
    for name, weights in pretrained.items():
        arms += [Arm(name, weights), Arm(f"{name} permuted", weights, shuffled=True)]
    return arms


@dataclass(frozen=True, eq=False)
class Bench:
    """What every run of a comparison shares.

    Attributes:
        data: labelled images.
        plan: of the splits.
        build: makes a backbone from a seed.
        tuning: but for mode and seed.
        config: compared on resume, beside `tuning` and the weights.
        folder: results and, while a run is going on, its checkpoints.
        engine: to train on.
        adapt_stem: see `load_backbone_weights`.
    """

    data: Labelled
    plan: Plan
    build: Callable[[int], Backbone]
    tuning: Tuning
    config: Mapping[str, Any]
    folder: Path
    engine: Engine
    adapt_stem: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """One finished run.

    Attributes:
        chances: `(n, K)` of the reported split.
        seconds: it took.
    """

    chances: Floats
    seconds: float


def run_arm(bench: Bench, arm: Arm, mode: Mode, seed: int) -> Result:
    """Train and evaluate one arm, or take up its finished run.

    Raises:
        CheckpointError: the folder holds a run of that name with other settings.
    """
    name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', arm.name)}-{mode}-seed{seed}"
    path = bench.folder / "arms" / f"{name}.json"
    tuning = replace(bench.tuning, mode=mode, seed=seed)
    config = {"tuning": asdict(tuning), **bench.config, "arm": {"weights": arm.identity}}
    if path.is_file():
        say(f"{name}: taken up from {path}")
        return _read(path, config)
    say(f"{name}:")
    backbone = arm.start(bench.build(seed), seed, bench.adapt_stem)
    checkpoints = bench.folder / "running" / name
    outcome = fine_tune(
        bench.data,
        bench.plan,
        backbone,
        tuning,
        folder=checkpoints,
        config={key: value for key, value in config.items() if key != "tuning"},
        resume=True,
        engine=bench.engine,
    )
    record = {
        "config": config,
        "metrics": outcome.metrics,
        "seconds": outcome.seconds,
        "history": outcome.history,
        "chances": outcome.chances.round(6).tolist(),
    }
    write_json(path, record)
    shutil.rmtree(checkpoints)
    return Result(outcome.chances.round(6), outcome.seconds)


def _read(path: Path, config: Mapping[str, Any]) -> Result:
    try:
        record = json.loads(path.read_text("utf-8"))
        found, chances = record["config"], np.asarray(record["chances"], dtype=np.float64)
        seconds = float(record["seconds"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a finished run: remove it") from error
    for section, values in json.loads(json.dumps(config)).items():
        for key, value in values.items():
            before = found.get(section, {}).get(key)
            if before != value:
                raise CheckpointError(
                    f"{path}: was made with {section}.{key}={before!r}, now {value!r}: "
                    f"give another --output-dir"
                )
    return Result(chances, seconds)


def compare(
    bench: Bench, arms: Sequence[Arm], modes: Sequence[Mode], seeds: Sequence[int]
) -> dict[str, Any]:
    """Run every arm in every mode with every seed.

    Returns:
        `note`, `reported`, `items`, and `rows`, one for each arm and mode: see `_row`.
    """
    rows = []
    for mode in modes:
        results = {arm.name: [run_arm(bench, arm, mode, seed) for seed in seeds] for arm in arms}
        rows += [_row(bench, name, mode, results) for name in results]
    return {
        "note": bench.plan.note,
        "reported": bench.plan.reported,
        "items": len(bench.plan.test),
        "seeds": list(seeds),
        "rows": rows,
    }


def _row(
    bench: Bench, name: str, mode: Mode, results: Mapping[str, Sequence[Result]]
) -> dict[str, Any]:
    """One line of the table.

    Each figure: mean over seeds, half-width of its t-interval over seeds, and the interval of the
    mean over resampled groups; the differences to scratch are paired, item by item.
    """
    chosen, groups = bench.plan.test, bench.data.groups[bench.plan.test]
    truth, task = bench.data.targets[chosen], bench.data.task

    def means(arm: str, some: NDArray[np.int64]) -> dict[str, float]:
        found = [
            supervised_metrics(result.chances[some], truth[some], task) for result in results[arm]
        ]
        return {key: float(np.mean([each[key] for each in found])) for key in SHOWN}

    def gains(some: NDArray[np.int64]) -> dict[str, float]:
        mine, theirs = means(name, some), means(SCRATCH, some)
        return {key: mine[key] - theirs[key] for key in SHOWN}

    whole = [
        supervised_metrics(result.chances, truth, task) for result in results[name]
    ]  # over seeds
    figures = with_intervals(lambda some: means(name, some), groups)
    ensemble = np.mean([result.chances for result in results[name]], axis=0)
    return {
        "arm": name,
        "mode": mode,
        **{key: figures[key] | _spread([each[key] for each in whole]) for key in SHOWN},
        "difference": None if name == SCRATCH else with_intervals(gains, groups),
        "ensemble": report(ensemble, bench.data, chosen),
        "seconds": float(np.mean([result.seconds for result in results[name]])),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds; None for one seed alone."""
    half = over_folds(values)["ci95"]
    known = len(values) > 1 and not math.isnan(half)
    return {"seeds_ci95": half if known else None, "seeds": list(values)}


def as_text(found: Mapping[str, Any]) -> str:
    """Lay a comparison out as a table for a terminal."""
    head = (
        "start",
        "mode",
        "AUC +- seeds [groups]",
        "accuracy +- seeds [groups]",
        "AUC - scratch",
        "seconds",
    )
    lines = [head, *(_cells(row) for row in found["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    count = len(found["seeds"])
    foot = [
        f"{found['items']} images of {found['reported']}; {found['note']}",
        f"mean over {count} seeds; +- 95 % over seeds; [] 95 % over resampled groups, paired for "
        "the difference, which leave out what another seed would change",
        "a gain counts as transfer only where it exceeds that of the same weights permuted",
    ]
    return "\n".join([*table, "", *foot])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    difference = "" if row["difference"] is None else _bracketed(row["difference"]["auc"], "+.3f")
    return (
        row["arm"],
        row["mode"],
        _figure(row["auc"]),
        _figure(row["accuracy"]),
        difference,
        f"{row['seconds']:.0f}",
    )


def _figure(figure: Mapping[str, Any]) -> str:
    half = figure["seeds_ci95"]
    return _bracketed(figure, ".3f", "" if half is None else f" +- {half:.3f}")


def _bracketed(figure: Mapping[str, Any], form: str, spread: str = "") -> str:
    if figure["value"] is None or figure["low"] is None:
        return "not defined"
    low, high = format(figure["low"], form), format(figure["high"], form)
    return f"{figure['value']:{form}}{spread} [{low}, {high}]"
