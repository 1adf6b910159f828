"""Convolutions in int8: a graph in float32 becomes a QDQ graph, calibrated on real inputs.

Figures below are the largest change of a probability over 72 held-out tiles, on each of three
phantom folds; as it is done here: .021, .032, .002, and no class changed.

Weights are int8, symmetric, with a scale for each channel. What flows between convolutions has
passed a ReLU and is uint8 with zero point 0. Symmetric int8, the only kind that TensorRT takes, has
one bit less there: .139, .074, .002. So TensorRT is for bundles in float16.

The first convolution stays in float. Its few input channels differ in spread, and one scale for all
loses the narrow ones: .164, .121, .010. On the single channel of a volume ONNX Runtime is slow in
int8 besides: the CT encoder took 1.15 of its time in float32 with that convolution in int8, and .47
without. Everything but convolutions stays in float too: it is little work, and decides.

Rounding shifts the mean of a channel, and averaging over a tile takes away noise but no shift. So
each bias is corrected by the shift that the calibration inputs show (Nagel et al. 2019, Data-free
quantization through weight equalization and bias correction; here from data). Without that: .083,
.181, .004, and a class changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

Arrays = Mapping[str, NDArray[Any]]


def quantise(graph: bytes, calibration: Sequence[Arrays]) -> bytes:
    """Bring the convolutions of a graph, but for the first, to int8.

    Args:
        graph: a single-file ONNX model in float32; each of its convolutions has a bias.
        calibration: inputs of the graph, as training knew them.

    Returns:
        A single-file QDQ model with the same inputs and outputs.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load_from_string(graph)
    first = next(node.name for node in model.graph.node if node.op_type == "Conv")
    # It asks for a step of simplification beforehand, which an export does not need.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)  # a model in memory would be changed
        quantize_static(
            source,
            path,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu"],
            nodes_to_exclude=[first],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantised = onnx.load(path)
    del quantised.metadata_props[:]
    correct_biases(quantised, model, calibration)
    data: bytes = quantised.SerializeToString()
    return data


def join(encoder: bytes, decider: bytes) -> bytes:
    """Put a decider behind a tile encoder, so that both bundle graphs hold the same encoder."""
    first = onnx.compose.add_prefix(
        onnx.load_from_string(encoder), "path_encoder.", rename_inputs=False, rename_outputs=False
    )
    tokens = first.graph.output[0].name
    joined = onnx.compose.merge_models(
        first, onnx.load_from_string(decider), io_map=[(tokens, tokens)]
    )
    del joined.opset_import[1:]  # both brought the same one
    data: bytes = joined.SerializeToString()
    return data


def correct_biases(
    quantised: onnx.ModelProto, model: onnx.ModelProto, calibration: Sequence[Arrays]
) -> None:
    """Take off each convolution's output what quantisation added to the mean of its channels.

    One after the other, as each sees what those before it give once they are corrected.

    Args:
        quantised: changed in place.
        model: in float, with nodes of the same names.
        calibration: inputs of both.
    """
    outputs = {node.name: node.output[0] for node in model.graph.node}
    makers = {node.output[0]: node for node in quantised.graph.node}
    convolutions = [
        (node, makers[node.input[2]])
        for node in quantised.graph.node
        if node.op_type == "Conv" and node.input[2] in makers
    ]
    wanted = _means(model, [outputs[node.name] for node, _ in convolutions], calibration)
    for node, bias in convolutions:
        found = _means(quantised, [node.output[0]], calibration)[node.output[0]]
        _raise_bias(quantised, bias, wanted[outputs[node.name]] - found)


def _raise_bias(model: onnx.ModelProto, bias: onnx.NodeProto, by: NDArray[np.float64]) -> None:
    """Add to a bias that is stored in int32 and brought to float by the node `bias`."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    stored, scale = (tensors[name] for name in bias.input[:2])
    steps = np.rint(by / numpy_helper.to_array(scale)).astype(np.int32)
    raised = numpy_helper.to_array(stored) + steps
    stored.CopyFrom(numpy_helper.from_array(raised, stored.name))


def _means(
    model: onnx.ModelProto, names: Sequence[str], calibration: Sequence[Arrays]
) -> dict[str, NDArray[np.float64]]:
    """Mean of each channel of inner values `(B, C, ...)` over the calibration inputs."""
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = Literal(seen.SerializeToString())
    found = [session.run(inputs) for inputs in calibration]
    weights = [len(values[names[0]]) for values in found]
    return {
        name: np.average(
            [_channel_means(values[name]) for values in found], axis=0, weights=weights
        )
        for name in names
    }


def _channel_means(values: NDArray[Any]) -> NDArray[np.float64]:
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    means: NDArray[np.float64] = values.mean(axis=axes, dtype=np.float64)
    return means


class Literal:
    """A graph computed as it is written, in float, nothing joined: what int8 kernels round to.

    Args:
        graph: bytes of a single-file ONNX model.
    """

    engine = "onnxruntime, not optimised"
    half = False

    def __init__(self, graph: bytes) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph."""
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))


def _reader(calibration: Sequence[Arrays]) -> Any:
    """The calibration inputs as ONNX Runtime asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # its package has no types
        """One set of inputs after the other, then None."""

        def __init__(self) -> None:
            self._left = iter(calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            found = next(self._left, None)
            return None if found is None else dict(found)

    return Reader()
