"""All that needs a GPU, in one command: `python benchmarks/gpu.py`.

Makes a model and its bundle in float16, builds TensorRT's plans, and sends every CUDA path through
the bundle's self-test, through generated inputs beside ONNX Runtime on the CPU, and through the
latency table. Prints what it finds and writes `benchmarks/results/gpu.json`. What is not installed
is named with the reason. Exit code 1: a path gives another answer, or something failed; the rest is
measured and written all the same. Exit code 2: there is no GPU.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from records import ROOT, write_result

from cdt_runtime.backends import Session, open_session, ort
from cdt_runtime.backends.ort_cuda import CudaSession
from cdt_runtime.backends.trt_build import build_plans
from cdt_runtime.bundle import Bundle
from cdt_runtime.console import one_line, run
from cdt_runtime.doctor import machine
from cdt_runtime.errors import BackendError, ParityError
from cdt_runtime.golden import ALLOWED, GOLDEN, HALF, compare_golden, relative_gap

Arrays = dict[str, NDArray[Any]]

PATHS: dict[str, Callable[[bytes], Session]] = {
    "cuda": lambda graph: open_session("cuda", graph),
    "cuda fp32": lambda graph: open_session("cuda", graph, "fp32"),
    "tensorrt": lambda graph: open_session("tensorrt", graph),
    "TensorRT through ONNX Runtime": lambda graph: CudaSession(
        graph, "fp32", "TensorrtExecutionProvider"
    ),
}
BATCHES = (1, 3, 32, 40)
"""One tile, a batch that is filled up, the largest of a plan, and one that is cut."""


@click.command("gpu.py")
@click.option("--quick", is_flag=True, help="Fewer rounds; nothing is written.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "models" / "latency",
    help="Where model, bundle and CT are made, once.  [default: models/latency]",
)
def main(quick: bool, work: Path) -> int:
    """Test and time every CUDA path of the runtime on this machine's GPU."""
    if not ort.gpu_present():
        raise BackendError("no NVIDIA GPU here (no driver): run this where nvidia-smi lists one")
    import latency

    started, work = time.monotonic(), work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["CDT_CACHE"] = str(work / "cache")
    subject = latency.prepare(work, quick)
    bundle = Bundle.open(subject.bundle)
    facts = machine()
    click.echo(f"{', '.join(facts['gpus']) or 'a GPU'}, driver {facts['driver']}")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "plans": lambda: plans(bundle),
        **{name: lambda name=name: examined(name, bundle) for name in PATHS},
        "host": lambda: host_latency(bundle, subject.rounds(700, 70)),
        "latency": lambda: table(subject),
    }
    found = {name: attempted(name, part) for name, part in parts.items()}
    if not quick:
        figures = {"device": facts, **found}
        path = write_result(
            "gpu", ["python benchmarks/gpu.py"], time.monotonic() - started, figures
        )
        click.echo(f"written: {path}", err=True)
    return 1 if any("wrong" in one for one in found.values()) else 0


def attempted(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one part: time on a GPU is dear, and what fails there must not cost the rest."""
    try:
        return part()
    except BackendError as error:
        found = {"not_run": str(error)}
    except ParityError as error:
        found = {"wrong": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"wrong": f"{type(error).__name__}: {error}"}
    click.echo(f"{name}: {one_line(*found.values())}")
    return found


def table(subject: Any) -> dict[str, Any]:
    """Every engine that is here on the same inputs, as `latency.py` measures them."""
    import latency_parts
    import latency_report

    found = latency_parts.engines(subject)
    click.echo(latency_report.engines_text(found))
    return found


def plans(bundle: Bundle) -> dict[str, Any]:
    """Build TensorRT's plans; the bytes of each, and the seconds of all."""
    started = time.monotonic()
    sizes = {name: path.stat().st_size for name, path in build_plans(bundle)}
    seconds = time.monotonic() - started
    click.echo(f"{len(sizes)} TensorRT plans in {seconds:.0f} s")
    return {"bytes": sizes, "seconds": seconds}


def examined(name: str, bundle: Bundle) -> dict[str, Any]:
    """Send one path through self-test and parity; the gap of each output."""
    graphs = bundle.manifest["graphs"]
    sessions = {graph: PATHS[name](bundle.read(f"{graph}.onnx")) for graph in graphs}
    allowed = ALLOWED[bundle.manifest["precision"]]
    if any(one.half for one in sessions.values()):
        allowed = max(allowed, HALF)
    tested = compare_golden(
        bundle.read(GOLDEN),
        lambda graph, inputs: sessions[graph].run(inputs),
        tolerance=allowed,
        what=f"{bundle.path.name} on {name}",
    )
    compared = parity(bundle, sessions, allowed)
    click.echo(
        f"{name}: self-test {max(tested.values()):.1e}, beside the CPU "
        f"{max(compared.values()):.1e}, allowed {allowed:g}"
    )
    engine = sessions["tile_classifier"].engine
    return {"engine": engine, "self_test": tested, "parity": compared}


def parity(bundle: Bundle, sessions: Mapping[str, Session], allowed: float) -> dict[str, float]:
    """Compare with ONNX Runtime on the CPU, on generated inputs in several sizes of batch.

    Returns:
        The largest gap of each graph and batch, as a share of an output's range.

    Raises:
        ParityError: one is larger than allowed.
    """
    gaps = {}
    for graph, session in sessions.items():
        plain = open_session("onnxruntime", bundle.read(f"{graph}.onnx"))
        for batch in BATCHES:
            inputs = generated(bundle.manifest["graphs"][graph]["inputs"], batch)
            expected, outputs = plain.run(inputs), session.run(inputs)
            gap = max(relative_gap(name, outputs[name], expected[name]) for name in expected)
            if not gap <= allowed:
                raise ParityError(
                    f"{session.engine}: {graph} at batch {batch} is off by {gap:.2g} of its "
                    f"range, allowed {allowed:g}"
                )
            gaps[f"{graph} {batch}"] = gap
    return gaps


def generated(inputs: Mapping[str, Any], batch: int) -> Arrays:
    """Random arrays of the shapes and types that a bundle's manifest gives for a graph."""
    rng, sizes = np.random.default_rng(batch), {"batch": batch, "classes": 3}
    found = {}
    for name, entry in inputs.items():
        values = rng.random([sizes.get(size, size) for size in entry["shape"]])
        scale = 255 if entry["dtype"] == "uint8" else 1
        found[name] = (values * scale).astype(entry["dtype"])
    return found


def host_latency(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """A tile through TensorRT from host to host, beside the bare replay of its CUDA graph."""
    from timing import interleaved

    from cdt_runtime.backends.trt import TensorRtSession
    from cdt_runtime.golden import one_tile

    session = TensorRtSession(bundle.read("tile_classifier.onnx"))
    inputs = one_tile(bundle)
    session.run(inputs)
    (fixed,) = session._fixed.values()
    with session._device.current():
        times = interleaved(
            {"run": lambda _: session.run(inputs), "replay": lambda _: fixed.replay()}, rounds
        )
    for name, one in times.items():
        click.echo(f"tile_classifier, TensorRT, {name}: p50 {one.p50:.3f} ms")
    return {name: one.facts() for name, one in times.items()}


if __name__ == "__main__":
    run(main)
