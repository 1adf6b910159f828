"""The scenarios of `latency.py`, named as MLPerf names them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pydicom
from latency_peers import Peer, flops, graphs_of, peak_flops, peers_of
from numpy.typing import NDArray
from timing import Times, interleaved, ratio

from cdt_runtime.backends import Session, open_session
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.ct import load_reduced, scan_series

PEAK = (
    "import atexit,sys;atexit.register(lambda: sys.stderr.write(open('/proc/self/status').read()));"
)
"""What a process runs first, to tell its own peak memory last: a parent's view counts its own."""

SLICES = 300
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        checkpoint: of the PyTorch model.
        bundle: its export.
        ct: a folder with a raw CT series.
        tiles: tile files.
        quick: fewer rounds, and none of what takes minutes.
    """

    checkpoint: Path
    bundle: Path
    ct: Path
    tiles: tuple[Path, ...]
    quick: bool

    def rounds(self, full: int, quick: int) -> int:
        """How often to measure."""
        return quick if self.quick else full


def engines(subject: Subject) -> dict[str, Any]:
    """Tile and CT graphs alone, in every engine that is here."""
    graphs = graphs_of(subject.checkpoint)
    classifier = FewShotClassifier.open(subject.bundle)
    found: dict[str, Any] = {}
    for name, rounds in (
        ("tile_classifier", subject.rounds(200, 30)),
        ("ct_encoder", subject.rounds(60, 10)),
    ):
        rotated = [_graph_inputs(name, classifier, subject, turn) for turn in range(4)]
        onnx = classifier.bundle.read(f"{name}.onnx")
        peers = peers_of(graphs[name], onnx, rotated[0], full=not subject.quick)
        running = {n: peer for n, peer in peers.items() if isinstance(peer, Peer)}
        best = _chosen(classifier)
        # Once more under another name: the noise of this run.
        calls = {n: _call(peer, rotated) for n, peer in running.items()}
        calls["(the same again)"] = calls[best]
        times = interleaved(calls, rounds)
        operations = flops(graphs[name], rotated[0])
        found[name] = {
            "gflop": operations / 1e9,
            "ours": best,
            "noise": abs(ratio(times["(the same again)"], times[best]) - 1),
            "peers": {
                n: {
                    **times[n].facts(),
                    "opened_ms": peer.opened_ms,
                    "gap": peer.gap,
                    "times_ours": ratio(times[n], times[best]),
                    "gflops": operations / times[n].p50 / 1e6,
                }
                for n, peer in running.items()
            },
            "not_run": {n: why for n, why in peers.items() if isinstance(why, str)},
        }
    found["peak_gflops"] = {n: value / 1e9 for n, value in peak_flops("cpu").items()}
    if any(name.endswith("GPU") for name in found["tile_classifier"]["peers"]):
        found["peak_gflops_gpu"] = {n: v / 1e9 for n, v in peak_flops("cuda").items()}
    return found


def single_stream(subject: Subject) -> dict[str, Any]:
    """One tile file after another with the CT in the cache, end to end and by its parts."""
    classifier = FewShotClassifier.open(subject.bundle)
    context = classifier.context(subject.ct)
    tiles = subject.tiles
    prepared = [classifier.read(tile) for tile in tiles]
    classifier.predict(tiles[:1], context)
    inputs = [_tile_inputs(classifier, context, tile.array[None]) for tile in prepared]
    session = _session(classifier, "tile_classifier")
    times = interleaved(
        {
            "end to end": lambda n: classifier.predict([tiles[n % len(tiles)]], context),
            "read": lambda n: classifier.read(tiles[n % len(tiles)]),
            "engine": lambda n: session.run(inputs[n % len(tiles)]),
        },
        subject.rounds(700, 70),
    )
    calls = _calls(classifier)
    parts = times["read"].p50 + calls * times["engine"].p50
    return {
        "on": classifier.engine,
        **{name: one.facts() for name, one in times.items()},
        "engine_calls": calls,
        "sum_of_parts": parts,
        "end_to_end_times_parts": times["end to end"].p50 / parts,
    }


def offline(subject: Subject) -> dict[str, Any]:
    """Many tile files at once: tiles a second, and of reading and of the engine alone."""
    classifier = FewShotClassifier.open(subject.bundle)
    context = classifier.context(subject.ct)
    count = subject.rounds(16, 2) * BATCH
    files = [subject.tiles[n % len(subject.tiles)] for n in range(count)]
    batch = np.stack([classifier.read(tile).array for tile in files[:BATCH]])
    inputs = _tile_inputs(classifier, context, batch)
    classifier.predict(files[:BATCH], context)
    session = _session(classifier, "tile_classifier")

    def engine(_: int) -> None:
        for _ in range(_calls(classifier) * count // BATCH):
            session.run(inputs)

    times = interleaved(
        {
            "end to end": lambda _: classifier.predict(files, context),
            "read": lambda _: [classifier.read(tile) for tile in files],
            "engine": engine,
        },
        subject.rounds(7, 3),
        warmup=1,
    )
    rates = {name: count / one.p50 * 1e3 for name, one in times.items()}
    return {
        "on": classifier.engine,
        "tiles": count,
        "batch": BATCH,
        "tiles_a_second": rates,
        "share_of_engine": rates["end to end"] / rates["engine"],
        "tiles_a_second_range": {
            name: [count / max(one.wall) * 1e3, count / min(one.wall) * 1e3]
            for name, one in times.items()
        },
    }


def ct_series(subject: Subject) -> dict[str, Any]:
    """A raw series to the encoder's input and to tokens, beside the bare reading of its bytes."""
    classifier = FewShotClassifier.open(subject.bundle)
    shape = classifier.preprocess.ct_means_shape
    files = sorted(path for path in subject.ct.rglob("*") if path.is_file())
    series = scan_series(subject.ct)
    volume = classifier.preprocess.ct_of_means(load_reduced(series, shape))
    session = _session(classifier, "ct_encoder")

    def to_input(_: int) -> NDArray[Any]:
        return classifier.preprocess.ct_of_means(load_reduced(scan_series(subject.ct), shape))

    times = interleaved(
        {
            "raw read": lambda _: _raw_read(files),
            "scan": lambda _: scan_series(subject.ct),
            "read and reduce": lambda _: load_reduced(series, shape),
            "to input": to_input,
            "encode": lambda _: session.run({"ct": volume}),
            "pydicom loop": lambda _: _pydicom_loop(files),
        },
        subject.rounds(9, 3),
        warmup=1,
    )
    return {
        "slices": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        **{name: one.facts() for name, one in times.items()},
        "to_input_times_raw_read": ratio(times["to input"], times["raw read"]),
        "pydicom_times_to_input": ratio(times["pydicom loop"], times["to input"]),
    }


def cold_start(subject: Subject) -> dict[str, Any]:
    """From process start to the first answer, beside a bare engine that does the same."""
    work = subject.bundle.parent
    classifier = FewShotClassifier.open(subject.bundle)
    series = scan_series(subject.ct)
    means = load_reduced(series, classifier.preprocess.ct_means_shape)
    np.save(work / "ct.npy", classifier.preprocess.ct_of_means(means))
    context = classifier.context(None)
    tile = classifier.read(subject.tiles[0]).array[None]
    np.savez(work / "tile.npz", **_tile_inputs(classifier, context, tile))
    ours = (
        *(sys.executable, "-c", f"{PEAK}from cdt_runtime.cli import infer; infer()"),
        *(str(subject.ct), str(subject.tiles[0]), "--bundle", str(subject.bundle), "--json"),
    )
    facts = (subject.bundle, subject.ct, work, classifier.backend, classifier.precision)
    script = Path(__file__).with_name("bare_start.py").read_text("utf-8")
    bare = (sys.executable, "-c", PEAK + script, *map(str, facts))
    times, memory = {"ours": Times(), "bare engine": Times()}, {"ours": 0.0, "bare engine": 0.0}
    for turn in range(subject.rounds(9, 2) + 1):
        for name, line in (("ours", ours), ("bare engine", bare)):
            took, peak, _ = timed_process(line, work / "cache")
            if turn:
                times[name].wall.append(took)
                memory[name] = max(memory[name], peak)
    return {
        "on": classifier.engine,
        "wall_ms": {name: one.facts() for name, one in times.items()},
        "times_bare": ratio(times["ours"], times["bare engine"]),
        "peak_mib": memory,
        "peak_times_bare": memory["ours"] / memory["bare engine"],
    }


def run_module(module: str, *words: str | Path) -> None:
    """Run a command in a process of its own, and say which."""
    click.echo(f"$ {module} {' '.join(map(str, words))}", err=True)
    line = [sys.executable, "-c", f"import {module} as it; it.main()", *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{module}: exit code {done.returncode}")


def timed_process(line: Sequence[str], cache: Path) -> tuple[float, float, str]:
    """Run a process without cached CT tokens.

    Returns:
        Its milliseconds, its peak memory in MiB, and what it printed.

    What else is in the cache, such as the outcome of the self-test, stays; modules are compiled,
    as they are where they were installed.
    """
    for path in cache.glob("*.tokens"):
        path.unlink()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    took = (time.perf_counter() - started) * 1e3
    if done.returncode:
        raise RuntimeError(f"{line[-5:]}: exit code {done.returncode}: {done.stderr[-500:]}")
    peak = re.search(r"VmHWM:\s*(\d+) kB", done.stderr)
    return took, int(peak[1]) / 1024 if peak else float("nan"), done.stdout


def _chosen(classifier: FewShotClassifier) -> str:
    """The name of the peer that the classifier runs on."""
    either = classifier.backend in ("onnxruntime", "tensorrt")  # the same in both precisions
    exact = classifier.precision == "fp32" and not either
    return f"{classifier.backend} {'fp32' if exact else 'auto'}"


def _session(classifier: FewShotClassifier, graph: str) -> Session:
    """A graph alone, in the engine that the classifier runs on."""
    onnx = classifier.bundle.read(f"{graph}.onnx")
    return open_session(classifier.backend, onnx, classifier.precision)


def _calls(classifier: FewShotClassifier) -> int:
    """Engine calls a batch: a second one tells what the CT would change where it is off."""
    return 2 if classifier.prototypes.ct_off else 1


def _call(peer: Peer, rotated: Sequence[dict[str, NDArray[Any]]]) -> Callable[[int], Any]:
    return lambda turn: peer.run(rotated[turn % len(rotated)])


def _graph_inputs(
    name: str, classifier: FewShotClassifier, subject: Subject, turn: int
) -> dict[str, NDArray[Any]]:
    if name == "ct_encoder":
        rng = np.random.default_rng(turn)
        shape = classifier.preprocess.ct_shape
        return {"ct": rng.uniform(-1, 1, shape).astype(np.float32)}
    tile = classifier.read(subject.tiles[turn % len(subject.tiles)]).array[None]
    return _tile_inputs(classifier, classifier.context(None), tile)


def _tile_inputs(
    classifier: FewShotClassifier, context: Any, tiles: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    return {
        "tile": tiles,
        "ct_tokens": context.tokens,
        "ct_present": context.present,
        "prototypes": classifier.class_prototypes(context),
        "scale": np.array([classifier.prototypes.scale], np.float32),
    }


def _raw_read(files: Sequence[Path]) -> None:
    buffer = bytearray(max(file.stat().st_size for file in files))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            stream.readinto(buffer)


def _pydicom_loop(files: Sequence[Path]) -> NDArray[np.float32]:
    """The usual way, which does not even resample."""
    slices = []
    for file in files:
        dataset = pydicom.dcmread(file)
        pixels = dataset.pixel_array.astype(np.float32)
        slices.append(pixels * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
    return np.stack(slices)
