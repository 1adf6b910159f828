"""A bundle as a model repository of Triton Inference Server.

    DIR/path_encoder/config.pbtxt, 1/model.onnx   requests are batched: no tile hangs on another
    DIR/bridge/ DIR/head/ ...                     a request at a time: its CT is its own
    DIR/ct_encoder/                               once a CT; the client keeps the tokens
    DIR/cdt/                                      the ensemble: tile, CT tokens, prototypes, scale
                                                  to logits and distances

Preparing tiles and CT, prototypes and abstention stay with the client: `FewShotClassifier`.
Source: Triton's model configuration (`model_config.proto`), as `tritonclient` carries it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends import Session, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import ExportError
from cdt_runtime.files import new_folder
from cdt_runtime.golden import ALLOWED, GOLDEN, one_tile, relative_gap

ENSEMBLE = "cdt"
STEPS = ("path_encoder", "bridge", "head")
PARTS = ("path_encoder", "bridge", "head", "ct_encoder", "tile_classifier")
VERSION = "1"
MAX_BATCH = 32
"""Tiles in one call, as the runtime's own: beyond it a CPU gains nothing and memory grows."""
QUEUE_MICROSECONDS = 2000
"""How long a request may wait for others: little beside the encoder's own time."""
BATCH = "batch"

_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "float16": "TYPE_FP16"}
_ORT_TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(float16)": "float16"}
Arrays = dict[str, NDArray[Any]]


def write_triton(bundle: Bundle, folder: Path) -> dict[str, float]:
    """Write the repository, and check it before it is put in place.

    Args:
        bundle: opened.
        folder: to make; must not exist, or be empty.

    Returns:
        How far each output of the ensemble is off that of the bundle's one graph, as a share of its
        range.

    Raises:
        ExportError: `folder` is not empty or can't be written, or the repository does not say what
            the graphs say, or does not compute what they compute.
        ModuleNotFoundError: tritonclient is not installed.
    """
    try:
        with new_folder(folder) as staging:
            for name, config in _configs(bundle).items():
                version = staging / name / VERSION
                version.mkdir(parents=True)
                (staging / name / "config.pbtxt").write_text(_as_text(config), "utf-8")
                if name != ENSEMBLE:
                    (version / "model.onnx").write_bytes(bundle.read(f"{name}.onnx"))
            return check_triton(staging, bundle)
    except OSError as error:
        raise ExportError(f"--triton {folder}: {error.strerror}: give another folder") from error


def _configs(bundle: Bundle) -> dict[str, Any]:
    """Make the configuration of each model, as a message."""
    from tritonclient.grpc import model_config_pb2 as proto

    graphs = bundle.manifest["graphs"]
    made = {}
    for name in PARTS:
        config = made[name] = proto.ModelConfig(name=name, platform="onnxruntime_onnx")
        batched = _is_batched(graphs[name])
        if batched:
            config.max_batch_size = MAX_BATCH
            config.dynamic_batching.max_queue_delay_microseconds = QUEUE_MICROSECONDS
        for kind, target in (("inputs", config.input), ("outputs", config.output)):
            for tensor, facts in graphs[name][kind].items():
                shape = facts["shape"][1:] if batched else facts["shape"]
                target.add(
                    name=tensor,
                    data_type=proto.DataType.Value(_TYPES[facts["dtype"]]),
                    dims=[one if isinstance(one, int) else -1 for one in shape],
                )
    made[ENSEMBLE] = _ensemble(graphs, proto)
    return made


def _is_batched(graph: Mapping[str, Any]) -> bool:
    """Whether every tensor has a row a tile, so that tiles of several requests can share a call."""
    tensors = {**graph["inputs"], **graph["outputs"]}.values()
    return all(one["shape"][0] == BATCH for one in tensors)


def _ensemble(graphs: Mapping[str, Any], proto: Any) -> Any:
    """Chain the steps: an output goes to the inputs of that name in later steps."""
    config = proto.ModelConfig(name=ENSEMBLE, platform="ensemble")
    made: set[str] = set()
    used = {
        *graphs[STEPS[-1]]["outputs"],
        *(one for name in STEPS for one in graphs[name]["inputs"]),
    }
    for name in STEPS:
        step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        for tensor, facts in graphs[name]["inputs"].items():
            step.input_map[tensor] = tensor
            if tensor not in made and tensor not in {one.name for one in config.input}:
                _add(config.input, tensor, facts, proto)
        for tensor in graphs[name]["outputs"].keys() & used:
            step.output_map[tensor] = tensor
            made.add(tensor)
    for tensor, facts in graphs[STEPS[-1]]["outputs"].items():
        _add(config.output, tensor, facts, proto)
    return config


def _add(target: Any, tensor: str, facts: Mapping[str, Any], proto: Any) -> None:
    target.add(
        name=tensor,
        data_type=proto.DataType.Value(_TYPES[facts["dtype"]]),
        dims=[one if isinstance(one, int) else -1 for one in facts["shape"]],
    )


def _as_text(config: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def check_triton(folder: Path, bundle: Bundle) -> dict[str, float]:
    """Check a repository as far as that can be done without the server.

    Each configuration is read back as the server reads it and held against its graph; then the
    ensemble's own steps are followed on ONNX Runtime with the bundle's golden tile and CT, several
    tiles at once and without a CT, too.

    Returns, raises: as `write_triton`.
    """
    configs = {path.parent.name: _parsed(path) for path in sorted(folder.glob("*/config.pbtxt"))}
    for name, config in configs.items():
        if config.name != name or not (folder / name / VERSION).is_dir():
            raise ExportError(f"{name}: its folder lacks a version, or has another name")
    sessions = {
        name: open_session("onnxruntime", (folder / name / VERSION / "model.onnx").read_bytes())
        for name, config in configs.items()
        if config.platform != "ensemble"
    }
    for name in sessions:
        _hold_against_graph(configs[name], folder / name / VERSION / "model.onnx")
    _hold_together(configs)
    gaps: dict[str, float] = {}
    for inputs in _requests(bundle):
        found = follow(configs, sessions, inputs)
        expected = sessions["tile_classifier"].run(inputs)
        for name, values in found.items():
            gaps[name] = max(gaps.get(name, 0.0), relative_gap(name, values, expected[name]))
    allowed = ALLOWED[bundle.manifest["precision"]]
    for name, gap in gaps.items():
        if not gap <= allowed:
            raise ExportError(
                f"{ENSEMBLE}: {name} is off by {gap:.2g} of its range, allowed {allowed:g}: "
                "the repository is not written"
            )
    return gaps


def _parsed(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as proto

    try:
        return text_format.Parse(path.read_text("utf-8"), proto.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(f"{path.parent.name}/{path.name}: can't be read ({error})") from error


def _hold_against_graph(config: Any, path: Path) -> None:
    """Hold names, types and shapes against what ONNX Runtime says of the graph."""
    import onnxruntime as ort

    graph = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for told, real in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
        asked = {one.name: (one.data_type, _full_dims(config, one)) for one in told}
        there = {one.name: (_type_of(one.type), _dims_of(one.shape)) for one in real}
        if asked != there:
            raise ExportError(f"{config.name}: the configuration says {asked}, the graph {there}")


def _type_of(name: str) -> int:
    from tritonclient.grpc import model_config_pb2 as proto

    return int(proto.DataType.Value(_TYPES[_ORT_TYPES[name]]))


def _dims_of(shape: list[Any]) -> list[int]:
    return [one if isinstance(one, int) else -1 for one in shape]


def _full_dims(config: Any, tensor: Any) -> list[int]:
    return [*([-1] if config.max_batch_size else []), *tensor.dims]


def _hold_together(configs: Mapping[str, Any]) -> None:
    """Hold the ensemble's tensors together: each comes from one place, in the shape it has there.

    The server lets a model that batches stand beside one that does not where the shapes agree with
    the batch in front.
    """
    ensemble = configs[ENSEMBLE]
    if ensemble.max_batch_size or ensemble.platform != "ensemble":
        raise ExportError(f"{ENSEMBLE}: expected an ensemble that takes a request at a time")
    known = {one.name: (one.data_type, list(one.dims)) for one in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        if dict(step.input_map).keys() != {one.name for one in model.input}:
            raise ExportError(f"{ENSEMBLE}: {model.name} needs other inputs than it is given")
        for tensor in model.input:
            there = known.get(step.input_map[tensor.name])
            if there != (tensor.data_type, _full_dims(model, tensor)):
                raise ExportError(f"{ENSEMBLE}: {model.name} can't take {tensor.name} as {there}")
        for tensor in model.output:
            name = step.output_map.get(tensor.name)
            if name in known:
                raise ExportError(f"{ENSEMBLE}: {name} is made twice")
            if name is not None:
                known[name] = (tensor.data_type, _full_dims(model, tensor))
    for tensor in ensemble.output:
        if known.get(tensor.name) != (tensor.data_type, list(tensor.dims)):
            raise ExportError(f"{ENSEMBLE}: nothing makes {tensor.name}")


def _requests(bundle: Bundle) -> list[Arrays]:
    """One tile with a CT, and several without: what clients may send at once."""
    one = {name: np.asarray(value) for name, value in one_tile(bundle).items()}
    stored = np.load(io.BytesIO(bundle.read(GOLDEN)), allow_pickle=False)
    several: Arrays = {name: stored[f"in_{name}"] for name in ("tile", "features") if name in one}
    alone: Arrays = {
        "ct_tokens": np.zeros_like(one["ct_tokens"]),
        "ct_present": np.zeros(1, np.float32),
    }
    return [one, {**one, **several}, {**one, **several, **alone}]


def follow(
    configs: Mapping[str, Any], sessions: Mapping[str, Session], inputs: Mapping[str, Any]
) -> Arrays:
    """Do what the ensemble says, step by step, on ONNX Runtime.

    Args:
        configs: parsed, by the name of the model.
        sessions: of the models that are graphs.
        inputs: of the ensemble.

    Returns:
        Its outputs.
    """
    ensemble = configs[ENSEMBLE]
    tensors = dict(inputs)
    for step in ensemble.ensemble_scheduling.step:
        given = {name: tensors[source] for name, source in step.input_map.items()}
        found = sessions[step.model_name].run(given)
        tensors |= {target: found[name] for name, target in step.output_map.items()}
    return {one.name: tensors[one.name] for one in ensemble.output}
