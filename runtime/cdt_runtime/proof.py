"""The choice of the engine: the fastest of those that pass the self-test on this machine.

What counts is the time of one tile, measured here: the tile graph runs for every tile, the CT
encoder once a series, whose tokens are then kept. The CT encoder may be faster in another engine,
but all graphs of a bundle run in one: to load a second engine costs a process more than the few
milliseconds that a series would gain, and answers name a single engine.

The outcome is a small file in the cache folder for each engine, named by all that it hangs on: the
bundle, the engine and its version, the precision and the machine. While it is there nothing is
tested or timed again, and the choice stays the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from cdt_runtime import __version__
from cdt_runtime.backends import BACKENDS, Precision
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import BackendError, ParityError
from cdt_runtime.files import replace_synced
from cdt_runtime.golden import self_test, tile_ms

EXACT: Precision = "fp32"


@dataclass(frozen=True)
class Choice:
    """What to run graphs on.

    Attributes:
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.
        notes: why each engine that is there must not be used, one line each.
    """

    backend: str
    precision: Precision
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What the self-test of an engine in one precision gave.

    Attributes:
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.
        refused: why it must not be used; empty where it passed.
        gap: the largest difference of an output, as a share of its range; None where refused.
        tile_ms: what one tile takes; None where refused.
    """

    backend: str
    precision: Precision
    refused: str
    gap: float | None = None
    tile_ms: float | None = None


def choose_backend(bundle: Bundle, precision: Precision, folder: Path | None) -> Choice:
    """Choose the engine that takes one tile through fastest, of those that pass the self-test.

    Args:
        bundle: an opened bundle.
        precision: the lowest that is allowed, as `open_session` takes it.
        folder: where outcomes are kept; None tests anew each time.

    Raises:
        BackendError: none can be used.
    """
    return fastest(examine(bundle, precision, folder))


def fastest(outcomes: Sequence[Outcome]) -> Choice:
    """Choose among engines by what `examine` found.

    Raises:
        BackendError: none can be used.
    """
    notes = tuple(f"{one.backend} is not used: {one.refused}" for one in outcomes if one.refused)
    passed = [one for one in outcomes if not one.refused]
    if not passed:
        raise BackendError(f"no engine can be used: {'; '.join(notes)}")
    best = min(passed, key=lambda one: one.tile_ms or math.inf)
    return Choice(best.backend, best.precision, notes)


def examine(
    bundle: Bundle, precision: Precision, folder: Path | None, *, anew: bool = False
) -> list[Outcome]:
    """Test and time every engine that is there, or take up what is kept.

    An engine whose fastest precision fails is tried in `fp32`. One that runs only what was built
    for it before is passed over until that is there.

    Args:
        bundle: an opened bundle.
        precision: the lowest that is allowed, as `open_session` takes it.
        folder: where outcomes are kept; None keeps none.
        anew: test and time also where an outcome is kept.

    Returns:
        One outcome an engine, in the order of `BACKENDS`.
    """
    found = []
    for name in (name for name in BACKENDS if _built(bundle, name) is not None):
        for tried in dict.fromkeys((precision, EXACT)):
            try:
                outcome = _outcome(bundle, name, tried, folder, anew)
            except BackendError as error:  # not kept: a driver may be mended tomorrow
                outcome = Outcome(name, tried, str(error))
                break
            if not outcome.refused:
                break
        found.append(outcome)
    return found


def _built(bundle: Bundle, name: str) -> str | None:
    """What an engine built for a bundle; None where it is missing, or the engine is."""
    files = bundle.manifest["files"]
    graphs = [files[f"{graph}.onnx"]["sha256"] for graph in bundle.manifest["graphs"]]
    return BACKENDS[name].built(graphs) if BACKENDS[name].present() else None


def _outcome(
    bundle: Bundle, name: str, precision: Precision, folder: Path | None, anew: bool
) -> Outcome:
    path = folder / f"{_key(bundle, name, precision)}.proof" if folder else None
    known = _read(path, name, precision) if path and not anew else None
    if known is not None:
        return known
    try:
        gap = max(self_test(bundle, name, precision).values())
        outcome = Outcome(name, precision, "", gap, tile_ms(bundle, name, precision))
    except ParityError as error:
        outcome = Outcome(name, precision, str(error))
    if path is not None:
        facts = {**asdict(outcome), "bundle": bundle.identity}
        _write(path, json.dumps(facts, indent=1).encode())
    return outcome


def _read(path: Path, name: str, precision: Precision) -> Outcome | None:
    """Take up a kept outcome; anything that is none is as good as no file."""
    try:
        facts = json.loads(path.read_bytes())
        if refused := str(facts["refused"]):
            return Outcome(name, precision, refused)
        return Outcome(name, precision, "", float(facts["gap"]), float(facts["tile_ms"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    with suppress(OSError):  # a folder that can't be written only costs time later
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(path, content)


def _key(bundle: Bundle, name: str, precision: Precision) -> str:
    files = bundle.manifest["files"].items()
    parts = (
        __version__,
        # The self-test has prototypes of its own: a class that is enrolled changes nothing of it.
        {file: entry for file, entry in files if not file.startswith("prototypes")},
        name,
        [_version(package) for package in BACKENDS[name].packages],
        _built(bundle, name),
        precision,
        platform.node(),
        platform.machine(),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
