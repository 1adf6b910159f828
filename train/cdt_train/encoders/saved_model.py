"""A TensorFlow SavedModel to ONNX, mended where the converter writes what no engine runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdt_runtime.backends import open_session
from cdt_runtime.errors import CheckpointError, MissingDependencyError
from cdt_runtime.files import write_synced

if TYPE_CHECKING:
    from onnx import ModelProto

SIGNATURE, OUTPUT = "serving_default", "output_0"
OPSET = 18
"""The newest that the converter writes."""

ALLOWED = 1e-4
"""Largest difference from TensorFlow."""

TRIALS = 4


def convert(folder: Path, output: Path) -> float:
    """Convert the signature `serving_default` of a SavedModel.

    Args:
        folder: with `saved_model.pb`.
        output: the ONNX file, from `images` to `embedding`.

    Returns:
        The largest difference from TensorFlow on images of noise.

    Raises:
        MissingDependencyError: TensorFlow or the converter is not installed.
        CheckpointError: the folder can't be converted, or ONNX does not say what TensorFlow does.
    """
    absent = [name for name in ("tensorflow", "tf2onnx", "onnx") if find_spec(name) is None]
    if absent:
        raise MissingDependencyError(
            f"{' and '.join(absent)} not installed: pip install 'cdt-edge[tensorflow]'"
        )
    if not (folder / "saved_model.pb").is_file():
        raise CheckpointError(
            f"{folder}: holds no saved_model.pb: give the folder of the SavedModel"
        )
    model = named(repair_erfc(_converted(folder)))
    images, expected = _by_tensorflow(folder)
    data = model.SerializeToString()
    found = open_session("onnxruntime", data).run({"images": images})["embedding"]
    gap = float(np.abs(found - expected).max())
    if not gap <= ALLOWED:
        raise CheckpointError(
            f"{folder}: ONNX differs from TensorFlow by {gap:.2g}, allowed {ALLOWED:g}: nothing is "
            f"written"
        )
    part = output.with_name(f"{output.name}.partial")
    write_synced(part, data)
    part.replace(output)
    return gap


def repair_erfc(model: ModelProto) -> ModelProto:
    """Write each `Erfc`, which is no operator of ONNX, as 1 - `Erf`, in place."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    wanted: dict[str, int] = {}
    kinds = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        kind = kinds.get(node.output[0]) or kinds.get(node.input[0]) or TensorProto.FLOAT
        one = f"one_of_type_{kind}"
        wanted[one] = kind
        inner = f"{node.output[0]}_erf"
        nodes.append(helper.make_node("Erf", list(node.input), [inner], f"{node.name}_erf"))
        nodes.append(helper.make_node("Sub", [one, inner], list(node.output), f"{node.name}_rest"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, kind in wanted.items():
        model.graph.initializer.append(helper.make_tensor(name, kind, [], [1.0]))
    kept = [one for one in model.opset_import if one.domain != "ai.onnx.contrib"]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def named(model: ModelProto) -> ModelProto:
    """Call the one input `images` and the one output `embedding`, in place.

    Raises:
        CheckpointError: there are more.
    """
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise CheckpointError(
            f"the SavedModel takes {len(graph.input)} inputs and gives {len(graph.output)}: "
            f"expected one of each"
        )
    names = {graph.input[0].name: "images", graph.output[0].name: "embedding"}
    for value in (graph.input[0], graph.output[0]):
        value.name = names[value.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return model


def _converted(folder: Path) -> ModelProto:
    import onnx

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "converted.onnx"
        words = ("--saved-model", folder, "--signature_def", SIGNATURE, "--tag", "serve")
        line = (sys.executable, "-m", "tf2onnx.convert", *words, "--opset", OPSET, "--output", path)
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
        if done.returncode or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"{folder}: can't be converted: {reason}")
        model: ModelProto = onnx.load(path)
        return model


def _by_tensorflow(folder: Path) -> tuple[Any, Any]:
    """Return images of noise, of the size that the signature asks for, and their embeddings."""
    import tensorflow

    run = tensorflow.saved_model.load(str(folder)).signatures[SIGNATURE]
    (name, spec), *_ = run.structured_input_signature[1].items()
    shape = [TRIALS, *(side or 224 for side in spec.shape[1:])]
    images = np.random.default_rng(0).random(shape).astype(np.float32)
    found = run(**{name: tensorflow.constant(images)})
    return images, found[OUTPUT].numpy()
