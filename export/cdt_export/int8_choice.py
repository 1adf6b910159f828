"""Which encoders of a bundle are worth having in int8.

An encoder is shipped in int8 only if it is faster in every CPU engine that is here, and if with it
the whole chain passes the parity gate. It stays in float32 otherwise, and the export says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_export.graphs import Graph, behind_encoder
from cdt_export.int8 import join, quantise
from cdt_export.onnx import to_onnx
from cdt_export.parity import NOT_WRITTEN
from cdt_runtime.backends import BACKENDS, open_session
from cdt_runtime.errors import ExportError, ParityError

ENCODERS = {"path_encoder": "tile", "ct_encoder": "ct"}
"""Graphs that can be brought to int8, with the name of their input."""

CPU_ENGINES = ("openvino", "onnxruntime")
MOST_TIME = 0.95
"""Largest share of the time in float that a graph in int8 may take, in each engine."""

OPENINGS, ROUNDS = 3, 40
"""How often an engine opens the graphs anew for a measurement, and how often it runs them then: how
fast a graph of a millisecond is also hangs on where its memory lies."""

BATCH = 16
"""Tiles in one calibration input."""

Arrays = Mapping[str, NDArray[Any]]
Models = Mapping[str, bytes]
Prove = Callable[[Models, Mapping[str, str]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Preprocessed inputs from the training side of the fold.

    Attributes:
        tiles: `(n, M, H, W)`.
        ct: `(m, W, D, S, S)`, without the volume that the parity gate runs; there may be none.
    """

    tiles: Tensor
    ct: Tensor

    def inputs(self, encoder: str) -> list[Arrays]:
        """What an encoder is calibrated with, a batch after the other."""
        values, size = (self.ct, 1) if encoder == "ct_encoder" else (self.tiles, BATCH)
        name = ENCODERS[encoder]
        return [{name: part.numpy()} for part in torch.split(values, size) if len(part)]


@dataclass(frozen=True)
class Verdict:
    """What became of an encoder.

    Attributes:
        encoder: the name of its graph.
        kept: whether it is shipped in int8.
        reason: why not.
        time: share of the time in float that it takes in each engine, where that was measured.
    """

    encoder: str
    kept: bool
    reason: str = ""
    time: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Mixed:
    """The graphs of a bundle of which some are in int8.

    Attributes:
        models: by name.
        precisions: what each computes in.
        parity: the figures of the gate for exactly these.
        verdicts: one an encoder.
    """

    models: dict[str, bytes]
    precisions: dict[str, str]
    parity: dict[str, Any]
    verdicts: list[Verdict]


def choose(
    graphs: Sequence[Graph], models: Models, calibration: Calibration, prove: Prove
) -> Mixed:
    """Bring to int8 what gains by it and passes the gate.

    Args:
        graphs: of the bundle.
        models: the same in float32, by name.
        calibration: real inputs.
        prove: runs the parity gate on models of those precisions.

    Raises:
        ParityError: the models in float32 do not pass the gate.
        ExportError: no encoder is kept in int8.
    """
    by_name = {graph.name: graph for graph in graphs}
    precisions = dict.fromkeys(models, "fp32")
    mixed = Mixed(dict(models), precisions, prove(models, precisions), [])
    for encoder in ENCODERS:
        inputs = calibration.inputs(encoder)
        if not inputs:
            reason = "no training CT but the one it would be proved on"
            mixed.verdicts.append(Verdict(encoder, False, reason))
            continue
        mixed = _with(mixed, _in_int8(encoder, by_name, models, inputs), by_name, prove)
    if not any(verdict.kept for verdict in mixed.verdicts):
        reasons = "; ".join(f"{one.encoder}: {one.reason}" for one in mixed.verdicts)
        raise ExportError(f"nothing to gain from --int8: {reasons}: {NOT_WRITTEN}: leave it out")
    return mixed


def _in_int8(
    encoder: str, graphs: Mapping[str, Graph], models: Models, inputs: Sequence[Arrays]
) -> dict[str, bytes]:
    """An encoder in int8, and last the graph of it that is run most."""
    made = {encoder: quantise(models[encoder], inputs)}
    if encoder == "path_encoder":
        decider = to_onnx(behind_encoder(graphs["tile_classifier"]), fp16=False)
        made["tile_classifier"] = join(made[encoder], decider)
    return made


def _with(mixed: Mixed, made: Models, graphs: Mapping[str, Graph], prove: Prove) -> Mixed:
    """Take in the graphs `made`, or say why not."""
    encoder, hot = next(iter(made)), [*made][-1]
    example = {name: value[:1] for name, value in _arrays(graphs[hot]).items()}
    shares = time_shares(mixed.models[hot], made[hot], example)
    models = {**mixed.models, **made}
    precisions = {**mixed.precisions, **dict.fromkeys(made, "int8")}
    reason = too_slow(shares)
    if not reason:
        try:
            parity = prove(models, precisions)
        except ParityError as error:
            reason = str(error).removesuffix(f": {NOT_WRITTEN}")
    if reason:
        mixed.verdicts.append(Verdict(encoder, False, reason, shares))
        return mixed
    return Mixed(models, precisions, parity, [*mixed.verdicts, Verdict(encoder, True, "", shares)])


def _arrays(graph: Graph) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in graph.inputs.items()}


def time_shares(model: bytes, quantised: bytes, inputs: Arrays) -> dict[str, float]:
    """Measure the CPU time of a graph in int8, in each CPU engine that is here.

    Each engine runs in its own fastest precision, as `auto` has it. The least of interleaved
    rounds counts; CPU time, because other work on the machine leaves it alone.

    Returns:
        Its share of the time of the graph in float, by engine.
    """
    shares = {}
    for engine in CPU_ENGINES:
        if not BACKENDS[engine].present():
            continue
        times = [_least_times(engine, (model, quantised), inputs) for _ in range(OPENINGS)]
        base, eight = (min(each) for each in zip(*times, strict=True))
        shares[engine] = round(eight / base, 3)
    return shares


def _least_times(engine: str, models: Sequence[bytes], inputs: Arrays) -> list[float]:
    """Least CPU seconds of one run of each model, in turns."""
    sessions = [open_session(engine, model) for model in models]
    least = [float("inf")] * len(models)
    for _ in range(ROUNDS):
        for place, session in enumerate(sessions):
            started = time.process_time()
            session.run(inputs)
            least[place] = min(least[place], time.process_time() - started)
    return least


def too_slow(shares: Mapping[str, float]) -> str:
    """Why a graph in int8 is not worth having; empty where it is.

    An engine that gains does not make up for one that loses: a bundle may be run by either.
    """
    slow = {engine: share for engine, share in shares.items() if share > MOST_TIME}
    if not slow:
        return ""
    return f"takes {_times(slow)} of the time in float, allowed {MOST_TIME:g}"


def as_record(mixed: Mixed, calibration: Calibration) -> dict[str, Any]:
    """Return what the manifest keeps of the choice."""
    return {
        "calibration": {"tiles": len(calibration.tiles), "ct": len(calibration.ct)},
        "encoders": {one.encoder: asdict(one) for one in mixed.verdicts},
    }


def choice_text(record: Mapping[str, Any]) -> str:
    """Return the lines that say which encoders are in int8, and why the others are not."""
    lines = []
    for name, facts in record["encoders"].items():
        if facts["kept"]:
            found = f"int8, {_times(facts['time'])} of the time in float"
        else:
            found = f"float32: {facts['reason']}"
        lines.append(f"{name:<16} {found}")
    used = record["calibration"]
    lines.append(f"{'calibrated':<16} on {used['tiles']} training tiles, {used['ct']} CT volumes")
    return "\n".join(lines)


def _times(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.2f} ({engine})" for engine, share in shares.items())
