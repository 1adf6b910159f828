"""From a checkpoint to a bundle: graphs, prototypes, golden values, proof, manifest."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdt_export import parity
from cdt_export.graphs import Graph, build_graphs
from cdt_export.inputs import open_data, read_tiles
from cdt_export.onnx import OPSET, describe, to_onnx
from cdt_export.parity import HeldOut
from cdt_runtime import __version__
from cdt_runtime.backends import Session, open_session
from cdt_runtime.bundle import Bundle, encoder_identity, write_bundle
from cdt_runtime.golden import GOLDEN, compare_golden, golden_inputs, golden_outputs
from cdt_runtime.prototypes import Prototypes
from cdt_train.data.arrays import TileArrays
from cdt_train.progress import bar
from cdt_train.split_record import SPLIT, SplitRecord
from cdt_train.trained import Trained


def export_bundle(
    trained: Trained, output: Path, *, precision: str, data_dir: Path | None
) -> Bundle:
    """Export, prove and write a bundle.

    Args:
        trained: what `load_trained` gave.
        output: folder of the bundle.
        precision: "fp32" or "fp16".
        data_dir: the training data, where it has moved since.

    Raises:
        DatasetError: the training data can't be read again.
        ParityError: the export does not decide as the model; nothing is written.
    """
    support, held_out = read_tiles(open_data(trained, data_dir))
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=len(support.classes))
    models = {}
    for graph in bar(graphs, "exporting"):
        models[graph.name] = to_onnx(graph, fp16=precision == "fp16")
    sessions = {name: open_session("onnxruntime", data) for name, data in models.items()}
    record = prove(trained, graphs, sessions, held_out, precision)
    files = {f"{name}.onnx": data for name, data in models.items()}
    encoder = encoder_identity(files, trained.preprocess)
    prototypes = support_prototypes(trained, support, held_out, sessions, encoder)
    files |= prototypes.to_files()
    files[SPLIT] = SplitRecord.of(trained.info).to_bytes()
    files[GOLDEN] = golden_file(trained, graphs)
    compare_golden(
        files[GOLDEN],
        lambda name, inputs: sessions[name].run(inputs),
        tolerance=parity.TOLERANCES[precision].relative,
        what="the export",
    )
    return write_bundle(output, files, _facts(trained, graphs, record, precision))


def prove(
    trained: Trained,
    graphs: list[Graph],
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    precision: str,
) -> dict[str, Any]:
    """Compare the exported graphs with PyTorch on held-out data.

    Returns:
        The figures, as the manifest keeps them.

    Raises:
        ParityError: a figure is out of bounds.
    """
    tolerance = parity.TOLERANCES[precision]
    compared = parity.compare_graphs(graphs, sessions, held_out)
    decisions = parity.compare_decisions(
        trained.model,
        sessions,
        held_out,
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
    own = parity.exported_ct_tokens(sessions["ct_encoder"], held_out.support_ct)
    facts = dict(trained.calibration)
    found = facts.pop("ct_gain")
    gain = {name: found[name] for name in ("mean", "ci95", "low")}
    return Prototypes(
        classes=support.classes,
        labels=support.labels,
        tokens=sessions["path_encoder"].run({"tile": support.tiles.numpy()})["tile_tokens"],
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


def golden_file(trained: Trained, graphs: list[Graph]) -> bytes:
    """Record what PyTorch answers to the golden inputs, as an `.npz` file."""
    modules = {graph.name: graph for graph in graphs}

    def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        return parity.run_module(modules[name], tensors)

    inputs = golden_inputs(trained.preprocess)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **inputs, **golden_outputs(inputs, run))
    return buffer.getvalue()


def _sides(split: Mapping[str, list[str]]) -> str:
    """Such as `108 tiles to train, 36 to validate, 72 to test`."""
    train, val, test = (len(split[side]) for side in ("train", "val", "test"))
    return f"{train} tiles to train, {val} to validate, {test} to test"


def _facts(
    trained: Trained, graphs: list[Graph], record: Mapping[str, Any], precision: str
) -> dict[str, Any]:
    graph_facts = {}
    for graph in graphs:
        outputs = parity.run_module(graph, graph.inputs)
        tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
        graph_facts[graph.name] = describe(graph, tensors)
    info = trained.info
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "producer": f"cdt-edge {__version__}",
        "notice": "research use only, not a medical device",
        "precision": precision,
        "opset": OPSET,
        "graphs": graph_facts,
        "preprocess": trained.preprocess.to_dict(),
        "parity": record,
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
