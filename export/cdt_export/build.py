"""From a checkpoint to a bundle: graphs, prototypes, golden values, proof, manifest."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdt_export import int8_choice, parity
from cdt_export.foundation import ExportedEncoder, export_encoder, notice
from cdt_export.graphs import Graph, build_graphs
from cdt_export.inputs import TrainingData, open_data, read_calibration, read_tiles
from cdt_export.int8 import Literal
from cdt_export.onnx import OPSET, describe, to_onnx
from cdt_export.parity import HeldOut
from cdt_export.reference import fit_reference, seen_tiles
from cdt_export.weight_only import Quantize
from cdt_runtime import __version__
from cdt_runtime.backends import Session, open_session
from cdt_runtime.bundle import Bundle, encoder_identity, write_bundle
from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoder_session import session_encode
from cdt_runtime.encoders import Encode, Encoders
from cdt_runtime.errors import ExportError
from cdt_runtime.golden import (
    ALLOWED,
    GOLDEN,
    Run,
    compare_golden,
    golden_inputs,
    golden_outputs,
)
from cdt_runtime.prototypes import Prototypes
from cdt_runtime.reference import REFERENCE, Reference, stacked
from cdt_runtime.signing import Sign
from cdt_runtime.tile_statistics import tile_statistics
from cdt_train.config import ModelRecipe
from cdt_train.data.arrays import TileArrays
from cdt_train.encoders.chosen import encoder_keys, load_chosen
from cdt_train.progress import bar
from cdt_train.split_record import SPLIT, SplitRecord
from cdt_train.trained import Trained


@dataclass(frozen=True, eq=False)
class Parts:
    """Graphs that have passed the gate, and what is to be said of them.

    Attributes:
        models: ONNX files by graph.
        precisions: what each graph computes in.
        golden: content of the golden file.
        facts: for the manifest.
    """

    models: Mapping[str, bytes]
    precisions: Mapping[str, str]
    golden: bytes
    facts: Mapping[str, Any]


def export_bundle(
    trained: Trained,
    output: Path,
    *,
    precision: str,
    data_dir: Path | None,
    quantize: Quantize = "none",
    sign: Sign | None = None,
) -> Bundle:
    """Export, prove and write a bundle.

    Args:
        trained: what `load_trained` gave.
        output: folder of the bundle.
        precision: "fp32", "fp16", or "int8" for the encoders that gain by it.
        data_dir: the training data, where it has moved since.
        quantize: how the weights of foundation encoders are kept.
        sign: what signs the bundle.

    Raises:
        DatasetError: the training data can't be read again.
        ParityError: the export does not decide as the model; nothing is written.
        ExportError: no encoder gains by int8, or a foundation encoder can't be exported as asked;
            nothing is written.
    """
    listens = bool(trained.info.get("encoders") or trained.info.get("path_encoder"))
    if precision == "int8" and listens:
        raise ExportError(
            "--int8: not for a model with foundation encoders, whose graphs are most of the work: "
            "give --quantize int8 for these"
        )
    data = open_data(trained, data_dir)
    support, held_out = read_tiles(data)
    eyes = exported_encoders(trained.recipe.model, quantize)
    shipped = read_tiles(replace(data, encoders=as_shipped(eyes)))[1] if listens else held_out
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=len(support.classes))
    if precision == "int8":
        parts = int8_parts(data, graphs, held_out)
    else:
        parts = plain_parts(trained, graphs, held_out, shipped, precision, quantize)
    sessions = open_all(parts.models)
    compare_golden(parts.golden, _run(sessions), tolerance=ALLOWED[precision], what="the export")
    files = {f"{name}.onnx": model for name, model in parts.models.items()}
    encoder = encoder_identity(files, trained.preprocess)
    known = support_prototypes(trained, support, shipped, sessions, encoder)
    chances = parity.chances_without_ct(sessions, shipped, known.scale, known.fit)
    held = tuple(chances[np.arange(len(chances)), shipped.labels].tolist())
    files |= replace(known, held_out=held).to_files()
    for eye in eyes:
        files |= eye.files
    reference, fitted = fit_reference(seen_tiles(data), len(trained.preprocess.channels))
    files[REFERENCE] = reference.to_bytes()
    files |= {SPLIT: SplitRecord.of(trained.info).to_bytes(), GOLDEN: parts.golden}
    facts = {**_facts(trained, graphs, parts.precisions), **parts.facts, "precision": precision}
    facts["reference"] = {**fitted, **false_alarms(reference, held_out)}
    if own := trained.info.get("path_encoder"):
        card = EncoderCard.from_dict(own)
        facts["path_encoder"] = own
        facts["licences"] |= {card.key: f"{card.licence}, {card.licence_url}"}
        files["path_encoder.txt"] = notice(card).encode()
    if eyes:
        facts["encoders"] = [eye.card.to_dict() for eye in eyes]
        facts["encoder_reports"] = [eye.report for eye in eyes]
        facts["licences"] |= {
            eye.card.key: f"{eye.card.licence}, {eye.card.licence_url}" for eye in eyes
        }
    return write_bundle(output, files, facts, sign)


def plain_parts(
    trained: Trained,
    graphs: list[Graph],
    held_out: HeldOut,
    shipped: HeldOut,
    precision: str,
    quantize: Quantize,
) -> Parts:
    """Export all graphs in one precision, "fp32" or "fp16".

    Args:
        trained: the model.
        graphs: its modules.
        held_out: data that training has not seen, as PyTorch's encoders see it.
        shipped: the same as the exported ones do.
        precision: of the graphs.
        quantize: how the weights of foundation encoders are kept.

    Raises:
        ParityError: they do not decide as the model.
    """
    models = export_all(graphs, fp16=precision == "fp16")
    precisions = {graph.name: graph.precision_in(precision) for graph in graphs}
    coarse = quantize not in ("none", "fp16")
    record = prove(
        trained, graphs, open_all(models), held_out, precisions, shipped=shipped, coarse=coarse
    )
    golden = golden_file(trained, _run_torch(graphs))
    return Parts(models, precisions, golden, {"parity": record})


def int8_parts(data: TrainingData, graphs: list[Graph], held_out: HeldOut) -> Parts:
    """Export the encoders that gain by it in int8, and everything else in float32.

    Raises:
        ParityError: even in float32 the graphs do not decide as the model.
        ExportError: no encoder gains.
    """

    def passes(models: Mapping[str, bytes], precisions: Mapping[str, str]) -> dict[str, Any]:
        return prove(data.trained, graphs, open_all(models), held_out, precisions)

    calibration = read_calibration(data, held_out.ct)
    mixed = int8_choice.choose(graphs, export_all(graphs, fp16=False), calibration, passes)
    literal = {name: Literal(model) for name, model in mixed.models.items()}
    golden = golden_file(data.trained, _run(literal))
    facts = {"parity": mixed.parity, "int8": int8_choice.as_record(mixed, calibration)}
    return Parts(mixed.models, mixed.precisions, golden, facts)


def export_all(graphs: Iterable[Graph], *, fp16: bool) -> dict[str, bytes]:
    """Export graphs to ONNX, by name."""
    return {graph.name: to_onnx(graph, fp16=fp16) for graph in bar(graphs, "exporting")}


def open_all(models: Mapping[str, bytes]) -> dict[str, Session]:
    """Open graphs in the engine that is always there."""
    return {name: open_session("onnxruntime", model) for name, model in models.items()}


def prove(
    trained: Trained,
    graphs: list[Graph],
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    precisions: Mapping[str, str],
    *,
    shipped: HeldOut | None = None,
    coarse: bool = False,
) -> dict[str, Any]:
    """Compare the exported graphs with PyTorch on held-out data.

    Args:
        trained: the model.
        graphs: its modules.
        sessions: the exported graphs by name.
        held_out: data that training has not seen.
        precisions: what each graph computes in; decisions are held to the coarsest.
        shipped: the same data as exported foundation encoders see it; None for as PyTorch's do.
        coarse: whether these have weights in few bits: decisions are then held to what int8 is.

    Returns:
        The figures, as the manifest keeps them.

    Raises:
        ParityError: a figure is out of bounds.
    """
    used = {*precisions.values(), *(("int8",) if coarse else ())}
    coarsest = next(name for name in ("int8", "fp16", "fp32") if name in used)
    tolerance = parity.TOLERANCES[coarsest]
    compared = parity.compare_graphs(graphs, sessions, held_out, precisions)
    decisions = parity.compare_decisions(
        trained.model,
        sessions,
        held_out,
        shipped or held_out,
        (trained.scale, trained.scale_with_ct),
        trained.calibration["fit"],
        tolerance,
    )
    parity.require_parity(compared, decisions, tolerance)
    return parity.as_record(compared, decisions, tolerance)


def support_prototypes(
    trained: Trained,
    support: TileArrays,
    held_out: HeldOut,
    sessions: Mapping[str, Session],
    encoder_sha256: str,
) -> Prototypes:
    """Encode the support tiles, and their patients' CT, with the exported encoders."""
    own = parity.exported_support_ct(sessions["ct_encoder"], held_out)
    facts = dict(trained.calibration)
    found = facts.pop("ct_gain")
    gain = {name: found[name] for name in ("mean", "ci95", "low")}
    return Prototypes(
        classes=support.classes,
        labels=support.labels,
        tokens=parity.exported_support_tokens(sessions, held_out),
        support_sha256=support.sha256,
        encoder_sha256=encoder_sha256,
        scale=trained.scale,
        scale_with_ct=trained.scale_with_ct,
        min_confidence=trained.recipe.training.min_confidence,
        fit=facts.pop("fit"),
        ct_context=facts.pop("ct_context"),
        ct_gain=gain if trained.info["ct_series"] else None,
        calibration=facts,
        ct_tokens=np.concatenate(own) if own else None,
        ct_of=held_out.support_ct_of if own else None,
    )


def false_alarms(reference: Reference, held_out: HeldOut) -> dict[str, Any]:
    """How many held-out tiles the runtime would not answer, as unlike the training tiles."""
    tiles = held_out.tiles.numpy()
    channels = tiles.shape[1]
    statistics = stacked([tile_statistics(tile) for tile in tiles], channels)
    unlike = reference.unlikeness(statistics, statistics[:0]) > 1
    refused = unlike | reference.blurred(statistics, channels)
    return {"held_out": len(tiles), "held_out_refused": int(refused.sum())}


def golden_file(trained: Trained, run: Run) -> bytes:
    """Record what `run` answers to the golden inputs, as an `.npz` file."""
    model = trained.model
    inputs = golden_inputs(trained.preprocess, model.tile_features.size, model.ct_features.size)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **inputs, **golden_outputs(inputs, run))
    return buffer.getvalue()


def exported_encoders(recipe: ModelRecipe, quantize: Quantize) -> list[ExportedEncoder]:
    """Export the foundation encoders that a model listens to.

    Raises:
        ExportError: one can't be exported as it was asked for.
    """
    return [
        export_encoder(load_chosen(recipe, key), quantize)
        for key in bar(encoder_keys(recipe), "encoders")
    ]


def as_shipped(eyes: Sequence[ExportedEncoder]) -> Encoders:
    """Let the exported encoders look, and keep nothing of what they say."""
    graphs = {eye.card.key: eye.onnx for eye in eyes}

    def opened(card: EncoderCard) -> Encode:
        return session_encode(open_session("onnxruntime", graphs[card.key]), card.key)

    return Encoders([eye.card for eye in eyes], opened, TokenCache(None))


def _run(sessions: Mapping[str, Session]) -> Run:
    return lambda name, inputs: sessions[name].run(inputs)


def _run_torch(graphs: list[Graph]) -> Run:
    modules = {graph.name: graph for graph in graphs}

    def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        return parity.run_module(modules[name], tensors)

    return run


def _sides(split: Mapping[str, list[str]]) -> str:
    """Such as `108 tiles to train, 36 to validate, 72 to test`."""
    train, val, test = (len(split[side]) for side in ("train", "val", "test"))
    return f"{train} tiles to train, {val} to validate, {test} to test"


def _facts(trained: Trained, graphs: list[Graph], precisions: Mapping[str, str]) -> dict[str, Any]:
    graph_facts = {}
    for graph in graphs:
        outputs = parity.run_module(graph, graph.inputs)
        tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
        graph_facts[graph.name] = describe(graph, tensors, precisions[graph.name])
    info = trained.info
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "producer": f"cdt-edge {__version__}",
        "notice": "research use only, not a medical device",
        "opset": OPSET,
        "graphs": graph_facts,
        "preprocess": trained.preprocess.to_dict(),
        "training": {
            "data": f"{info['data']} ({_sides(info['split'])})",
            "phantom": info["phantom"],
            "classes": info["classes"],
            "grouped_by": info["grouped_by"],
            "warnings": info["warnings"],
            "seed": info["seed"],
            "fold": info["fold"],
            "k_shot": trained.recipe.training.k_shot,
            "layout": info["layout"],
            "recipe": trained.recipe.to_dict(),
            "test": trained.test,
        },
        "licences": {"weights": "trained from nothing on the data named under training"},
    }
