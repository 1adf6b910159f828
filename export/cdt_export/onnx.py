"""Torch modules to ONNX, one self-contained file each."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cdt_export.graphs import Graph, HalfPrecision

OPSET = 20
"""The newest opset whose normalisations and attention every engine at hand runs."""

HALF_PRECISION_GRAPHS = ("ct_encoder", "path_encoder", "bridge", "tile_classifier")
"""The head stays in float32: it is tiny and decides."""


def to_onnx(graph: Graph, *, fp16: bool) -> bytes:
    """Export one graph.

    Args:
        graph: its module stays as it is.
        fp16: compute in float16 behind float32 inputs and outputs; the head never does.

    Returns:
        A single-file ONNX model, weights included.
    """
    half = fp16 and graph.name in HALF_PRECISION_GRAPHS
    module = HalfPrecision(copy.deepcopy(graph.module)) if half else graph.module
    names = list(graph.inputs)
    arguments = tuple(graph.inputs.values())
    axes: Any = tuple(
        {axis: torch.export.Dim(label) for axis, label in graph.dynamic.get(name, {}).items()}
        for name in names
    )
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(graph.outputs),
            dynamic_shapes=(axes,) if half else axes,
            verbose=False,
        )
    assert program is not None  # the exporter raises on failure
    data: bytes = program.model_proto.SerializeToString()
    return data


def describe(graph: Graph, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Names, shapes and dtypes of a graph, as the manifest records them.

    A dynamic axis is given by its name.
    """
    return {
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
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in outputs.items()
        },
    }


@contextmanager
def _quiet() -> Iterator[None]:
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
