"""Golden values: the self-test of a bundle, on any engine and any machine.

The inputs are generated, so that no patient's pixels travel in a bundle. The outputs are what the
PyTorch model gave for them; in a bundle in int8, whose graphs differ from it on purpose, what the
graphs give when they are computed as they are written, in float.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends import Precision, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import ParityError
from cdt_runtime.preprocess import Preprocess, area_resize
from cdt_runtime.prototypes import class_means

GOLDEN = "golden.npz"

FULL, HALF, EIGHT_BIT = 1e-3, 2e-2, 5e-2
"""How far an output may be off, as a share of its range: rounding of float32 sums in another order
stays below 1e-4, of float16 and bfloat16 below 1e-2. One step of uint8 is 4e-3, and engines round
at other places (pooled values too, or not), parts in bfloat16 besides: below 2.5e-2."""
ALLOWED = {"fp32": FULL, "fp16": HALF, "int8": EIGHT_BIT}
"""The same by the precision of a bundle."""

WARMUP, ROUNDS = 3, 11
"""Calls before and in a measurement: enough to rank engines, and over in the time of a start."""

_CLASSES = np.array([0, 0, 1, 1])
_SCALE = np.array([5.0], dtype=np.float32)

Arrays = dict[str, NDArray[Any]]
Run = Callable[[str, Mapping[str, NDArray[Any]]], Arrays]


def golden_inputs(preprocess: Preprocess, features: int = 0, ct_features: int = 0) -> Arrays:
    """Generate the inputs: smooth random patterns of the right size and range.

    Args:
        preprocess: of the model.
        features: F, figures that foundation encoders give for a tile.
        ct_features: the same for a CT.

    Returns:
        `in_ct` `(1, W, D, S, S)` and `in_tile` `(4, M, S, S)`; tiles 0, 1 and 2, 3 are two classes.
        Where there are any, `in_features` `(4, F)` and `in_ct_features` `(1, F)`, normal.
    """
    rng = np.random.default_rng(20240517)
    ct = _smooth(rng, preprocess.ct_shape, cell=8) * 2 - 1
    tile = np.stack([_smooth(rng, preprocess.tile_shape, cell=4 * (n // 2 + 1)) for n in range(4)])
    if preprocess.tile_dtype == "uint8":
        tile = np.rint(tile * 255)
    made: Arrays = {
        "in_ct": ct.astype(np.float32),
        "in_tile": tile.astype(preprocess.tile_dtype),
    }
    for name, count, size in (("in_features", 4, features), ("in_ct_features", 1, ct_features)):
        if size:
            made[name] = rng.standard_normal((count, size)).astype(np.float32)
    return made


def golden_outputs(inputs: Mapping[str, NDArray[Any]], run: Run) -> Arrays:
    """Send the golden inputs through the whole chain.

    Args:
        inputs: what `golden_inputs` gave.
        run: runs the graph of that name.

    Returns:
        Outputs by name: CT tokens, and embeddings and logits with CT and without.
    """
    ct, tile = (_named(inputs, *names) for names in (("ct", "ct_features"), ("tile", "features")))
    tokens = run("ct_encoder", ct)["ct_tokens"]
    results: Arrays = {"out_ct_tokens": tokens}
    for name, present in (("with_ct", 1.0), ("without_ct", 0.0)):
        context = {"ct_tokens": tokens, "ct_present": np.array([present], dtype=np.float32)}
        tile_tokens = run("path_encoder", tile)["tile_tokens"]
        embedding = run("bridge", {"tile_tokens": tile_tokens, **context})["embedding"]
        # Whatever the bundle's own fit: a ridge's regulariser may jump with the last bit.
        means = class_means(embedding, _CLASSES, 2)
        head = {"prototypes": means, "scale": _SCALE}
        outputs = run("tile_classifier", {**tile, **context, **head})
        alone = run("head", {"embedding": embedding, **head})
        results[f"out_embedding_{name}"] = outputs["embedding"]
        results[f"out_ct_residual_{name}"] = outputs["ct_residual"]
        results[f"out_logits_{name}"] = outputs["logits"]
        results[f"out_distances_{name}"] = alone["distances"]
    return results


def _named(inputs: Mapping[str, NDArray[Any]], *names: str) -> Arrays:
    """Take the inputs of a graph, those that there are."""
    return {name: inputs[f"in_{name}"] for name in names if f"in_{name}" in inputs}


def self_test(bundle: Bundle, backend: str, precision: Precision = "auto") -> dict[str, float]:
    """Run the golden inputs on an engine and compare.

    Args:
        bundle: an opened bundle.
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.

    Returns:
        The largest difference of each output as a share of its range.

    Raises:
        ParityError: an output is further off than the precision explains.
        BackendError: the engine can't run here.
    """
    sessions = {
        name: open_session(backend, bundle.read(f"{name}.onnx"), precision)
        for name in bundle.manifest["graphs"]
    }
    tolerance = ALLOWED[bundle.manifest["precision"]]
    if any(one.half for one in sessions.values()):
        tolerance = max(tolerance, HALF)
    return compare_golden(
        bundle.read(GOLDEN),
        lambda name, inputs: sessions[name].run(inputs),
        tolerance=tolerance,
        what=f"{bundle.path.name} on {backend}",
    )


def tile_ms(bundle: Bundle, backend: str, precision: Precision = "auto") -> float:
    """Time one tile with a CT on an engine, from host to host.

    Args:
        bundle: an opened bundle.
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.

    Returns:
        The median of a few calls after a warm-up, in milliseconds.

    Raises:
        BackendError: the engine can't run here.
    """
    session = open_session(backend, bundle.read("tile_classifier.onnx"), precision)
    inputs = one_tile(bundle)
    times = []
    for _ in range(WARMUP + ROUNDS):
        started = perf_counter()
        session.run(inputs)
        times.append((perf_counter() - started) * 1e3)
    return median(times[WARMUP:])


def one_tile(bundle: Bundle) -> Arrays:
    """Make the golden inputs of the tile graph at batch 1, of a tile in the context of a CT."""
    stored = np.load(io.BytesIO(bundle.read(GOLDEN)), allow_pickle=False)
    return {
        **{name: value[:1] for name, value in _named(stored, "tile", "features").items()},
        "ct_tokens": stored["out_ct_tokens"],
        "ct_present": np.ones(1, np.float32),
        "prototypes": class_means(stored["out_embedding_with_ct"], _CLASSES, 2),
        "scale": _SCALE,
    }


def compare_golden(golden: bytes, run: Run, *, tolerance: float, what: str) -> dict[str, float]:
    """Compare what `run` makes of the golden inputs with the stored outputs.

    Args:
        golden: content of `golden.npz`.
        run: runs the graph of that name.
        tolerance: allowed difference as a share of each output's range.
        what: what an error calls that which is tested.

    Returns:
        That share for each output.

    Raises:
        ParityError: an output is further off.
    """
    stored = np.load(io.BytesIO(golden), allow_pickle=False)
    inputs = {name: stored[name] for name in stored.files if name.startswith("in_")}
    gaps = {}
    for name, values in golden_outputs(inputs, run).items():
        gaps[name] = relative_gap(name, values, stored[name])
        if not gaps[name] <= tolerance:
            raise ParityError(
                f"{what}: {name} is off by {gaps[name]:.2g} of its range, allowed {tolerance:g}: "
                f"it must not be used"
            )
    return gaps


def relative_gap(name: str, found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference of an output as a share of its largest value; infinite if it is no number.

    Logits and distances are measured by at least 1: near zero they are rounding all over.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    floor = 1.0 if "logits" in name or "distances" in name else 1e-6
    largest = float(np.abs(expected).max(initial=floor))
    return float(np.abs(found - expected).max(initial=0.0)) / largest


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], cell: int) -> NDArray[np.float32]:
    """Draw noise on a coarse grid and interpolate it; values 0 to 1."""
    coarse = (*shape[:-2], shape[-2] // cell, shape[-1] // cell)
    result: NDArray[np.float32] = area_resize(rng.random(coarse), shape)
    return result
