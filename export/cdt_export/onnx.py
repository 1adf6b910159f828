"""Torch modules to ONNX, one self-contained file each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cdt_export.graphs import Graph, HalfPrecision, in_half_precision

OPSET = 20
"""The newest opset whose normalisations and attention every engine at hand runs."""


OUT = "output_of_"
"""Before an output's name while the exporter works: it calls other values by such names, too."""

_BATCH, _BATCH_AND_CLASSES = {0: "batch"}, {0: "batch", 1: "classes"}
OUTPUT_AXES: dict[str, dict[int, str]] = {
    "tile_tokens": _BATCH,
    "embedding": _BATCH,
    "ct_residual": _BATCH,
    "logits": _BATCH_AND_CLASSES,
    "distances": _BATCH_AND_CLASSES,
}
"""Names of the dynamic axes of outputs."""


def to_onnx(graph: Graph, *, fp16: bool) -> bytes:
    """Export one graph.

    Args:
        graph: its module stays as it is.
        fp16: compute in float16 behind float32 inputs and outputs.

    Returns:
        A single-file ONNX model, weights included.
    """
    module = in_half_precision(graph.module) if fp16 else graph.module
    names = list(graph.inputs)
    arguments = tuple(graph.inputs.values())
    axes: Any = tuple(
        {axis: torch.export.Dim(label) for axis, label in graph.dynamic.get(name, {}).items()}
        for name in names
    )
    with quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[f"{OUT}{name}" for name in graph.outputs],
            dynamic_shapes=(axes,) if isinstance(module, HalfPrecision) else axes,
            verbose=False,
        )
    assert program is not None  # the exporter raises on failure
    model = program.model_proto
    rename_values(model, {f"{OUT}{name}": name for name in graph.outputs})
    strip_notes(model)
    _cast_first(model)
    data: bytes = model.SerializeToString()
    return data


def describe(graph: Graph, outputs: dict[str, Tensor], precision: str) -> dict[str, Any]:
    """Precision, names, shapes and dtypes of a graph, as the manifest records them.

    A dynamic axis is given by its name.
    """
    return {
        "precision": precision,
        "inputs": {
            name: {
                "shape": [
                    graph.dynamic.get(name, {}).get(axis, size)
                    for axis, size in enumerate(tensor.shape)
                ],
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            for name, tensor in graph.inputs.items()
        },
        "outputs": {
            name: {
                "shape": [
                    OUTPUT_AXES.get(name, {}).get(axis, size)
                    for axis, size in enumerate(tensor.shape)
                ],
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            for name, tensor in outputs.items()
        },
    }


def rename_values(model: Any, names: dict[str, str]) -> None:
    """Rename inputs and outputs of a graph; what else has such a name is moved out of the way."""
    graph = model.graph
    names = {**{new: f"{new}_within" for new in names.values()}, **names}
    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def strip_notes(model: Any) -> None:
    """Remove the exporter's stack traces: they name files of the machine that exported."""
    del model.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        del value.metadata_props[:]


def _cast_first(model: Any) -> None:
    """Let nothing but casts take an 8-bit input: TensorRT tells the shape of no other uint8."""
    from onnx import TensorProto

    graph = model.graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in graph.input}
    eight_bit = {name for name, kind in kinds.items() if kind == TensorProto.UINT8}
    casts = {
        node.input[0]: node.output[0]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in eight_bit
    }
    graph.node.sort(key=lambda node: not (node.op_type == "Cast" and node.input[0] in casts))
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in casts:
            node.input[0] = casts[node.input[0]]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
