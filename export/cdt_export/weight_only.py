"""Weights of an ONNX graph in fewer bits: 8, 4, NF4, or halves.

Matrix products with constant weights hold nearly all of a transformer; those of `Gemm` are written
as `MatMul` and `Add` first, so that they are covered. Convolutions are kept in halves or, with
every other method, in 8 bits: there are no operators for fewer.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cdt_runtime.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Quantize = Literal["none", "fp16", "int8", "int8-qdq", "int4", "nf4"]
METHODS: tuple[Quantize, ...] = get_args(Quantize)

INT8_BLOCK, INT4_BLOCK, NF4_BLOCK = 32, 64, 64
"""Weights that share a scale; larger blocks save little and lose more."""

NF4 = 1
"""As ONNX Runtime numbers 4-bit floats: 0 is FP4, 1 NF4."""

OUTPUT_AXIS = {"MatMul": 1, "Conv": 0}
"""Operators whose second input is a weight, and the axis of it that runs over the outputs."""

LEAST_COVERED = 0.4
"""Share of the bytes of all weights that must be in fewer bits; else the size hardly changes."""


@dataclass(frozen=True)
class Coverage:
    """How much of a graph is in fewer bits.

    Attributes:
        nodes: share of its matrix products and convolutions with constant weights.
        bytes: share of the bytes of all its weights.
    """

    nodes: float
    bytes: float


def quantise(model: ModelProto, method: Quantize) -> tuple[ModelProto, Coverage]:
    """Bring the weights of a graph to fewer bits.

    Args:
        model: in float32; it may be changed.
        method: `int8-qdq` writes standard operators, which TensorRT takes; `int8`, `int4` and `nf4`
            those of ONNX Runtime.

    Raises:
        ExportError: too little of the graph is covered.
    """
    total = weight_bytes(model)
    sizes = {name: _bytes(one) for name, (one, _) in _weights(split_gemm(model)).items()}
    if method == "none":
        return model, Coverage(0.0, 0.0)
    with _quiet():
        made = _WAYS[method](model)
    left = _weights(made)
    done = [name for name in sizes if name not in left]
    coverage = Coverage(
        len(done) / max(1, len(sizes)), sum(sizes[name] for name in done) / max(1, total)
    )
    if not coverage.bytes >= LEAST_COVERED:
        raise ExportError(
            f"--quantize {method}: covers {coverage.bytes:.0%} of the weights, at least "
            f"{LEAST_COVERED:.0%} are expected: export with --quantize none"
        )
    return made, coverage


def split_gemm(model: ModelProto) -> ModelProto:
    """Write each `Gemm` with constant weights as `MatMul` and `Add`, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    nodes = []
    for node in graph.node:
        options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0
        if (
            node.op_type != "Gemm"
            or not plain
            or options.get("transA")
            or node.input[1] not in constants
        ):
            nodes.append(node)
            continue
        weight = node.input[1]
        if options.get("transB"):
            turned = numpy_helper.to_array(constants[weight]).T
            weight = f"{weight}_turned_{len(nodes)}"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(turned), weight))
        biased = len(node.input) > 2 and node.input[2] != ""
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(
            helper.make_node("MatMul", [node.input[0], weight], [product], f"{node.name}_mm")
        )
        if biased:
            bias = [product, node.input[2]]
            nodes.append(helper.make_node("Add", bias, [node.output[0]], f"{node.name}_add"))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(model)
    return model


def _int8(model: ModelProto) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        _qdq(model, "Conv"), bits=8, block_size=INT8_BLOCK, is_symmetric=True
    )
    made.process()
    result: ModelProto = made.model.model
    return result


def _int4(model: ModelProto) -> ModelProto:
    """By half-quadratic quantisation, which loses a third less than rounding to the nearest."""
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    way = library.HQQWeightOnlyQuantConfig(block_size=INT4_BLOCK, bits=4)
    made = library.MatMulNBitsQuantizer(_qdq(model, "Conv"), algo_config=way)
    made.process()
    result: ModelProto = made.model.model
    return result


def _nf4(model: ModelProto) -> ModelProto:
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    made = MatMulBnb4Quantizer(_qdq(model, "Conv"), NF4, NF4_BLOCK)
    made.process()
    result: ModelProto = made.model.model
    return result


def _halves(model: ModelProto) -> ModelProto:
    """Keep weights as float16; they are computed with in float32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for name, (one, _) in _weights(model).items():
        halves = numpy_helper.to_array(one).astype(np.float16)
        kept = numpy_helper.from_array(halves, f"{name}_half")
        model.graph.initializer.append(kept)
        casts.append(helper.make_node("Cast", [kept.name], [f"{name}_full"], to=TensorProto.FLOAT))
        _replace_weight(model, name, f"{name}_full")
    return _with_first(model, casts)


def _qdq(model: ModelProto, *kinds: str) -> ModelProto:
    """Keep weights in 8 bits, each output with a scale, behind `DequantizeLinear`."""
    from onnx import helper, numpy_helper

    unpacked = []
    for name, (one, kind) in _weights(model, *kinds).items():
        weight, axis = numpy_helper.to_array(one), OUTPUT_AXIS[kind]
        others = tuple(place for place in range(weight.ndim) if place != axis)
        scale = (np.abs(weight).max(axis=others) / 127).clip(min=1e-12).astype(np.float32)
        steps = np.rint(weight / np.expand_dims(scale, others)).clip(-127, 127).astype(np.int8)
        parts = {"steps": steps, "scale": scale, "zero": np.zeros_like(scale, dtype=np.int8)}
        for part, values in parts.items():
            model.graph.initializer.append(numpy_helper.from_array(values, f"{name}_{part}"))
        inputs = [f"{name}_{part}" for part in parts]
        unpacked.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_full"], axis=axis))
        _replace_weight(model, name, f"{name}_full")
    return _with_first(model, unpacked)


_WAYS: dict[str, Callable[[Any], Any]] = {
    "fp16": _halves,
    "int8": _int8,
    "int8-qdq": _qdq,
    "int4": _int4,
    "nf4": _nf4,
}


def _weights(model: ModelProto, *kinds: str) -> dict[str, tuple[TensorProto, str]]:
    """Constant weights of matrix products (two-dimensional) and convolutions, with their kind."""
    constants = {one.name: one for one in model.graph.initializer if len(one.dims) >= 2}
    found = {}
    for node in model.graph.node:
        if node.op_type in (kinds or OUTPUT_AXIS) and node.input[1] in constants:
            one = constants[node.input[1]]
            if node.op_type != "MatMul" or len(one.dims) == 2:
                found[one.name] = (one, node.op_type)
    return found


def weight_bytes(model: ModelProto) -> int:
    """Bytes of all weights; tables of places, which are whole numbers, are none."""
    from onnx import TensorProto

    floats = [one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT]
    return sum(map(_bytes, floats))


def _bytes(weight: TensorProto) -> int:
    size: int = 4 * math.prod(weight.dims)
    return size


def _replace_weight(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        if node.op_type in OUTPUT_AXIS and node.input[1] == old:
            node.input[1] = new


def _with_first(model: ModelProto, nodes: list[Any]) -> ModelProto:
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    _drop_unused(model)
    return model


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantisers, which tell of every node and, once imported, let everybody tell."""
    root = logging.root
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
