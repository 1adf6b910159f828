"""Building TensorRT's plans: minutes, on the machine that will run them, and only when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.backends.device import first_device
from cdt_runtime.backends.shapes import BATCH, Input
from cdt_runtime.backends.trt_library import load_tensorrt, logger, made, require
from cdt_runtime.backends.trt_plan import (
    Plan,
    find_target,
    plan_path,
    plans_folder,
    write_plan,
    write_whole,
)
from cdt_runtime.bundle import Bundle, sha256
from cdt_runtime.errors import BackendError
from cdt_runtime.onnx_scan import require_whole

LARGEST_BATCH = 32
RANGES: tuple[Mapping[str, tuple[int, int, int]], ...] = (
    {BATCH: (1, 1, 1), "classes": (1, 8, 1024)},
    {BATCH: (1, LARGEST_BATCH, LARGEST_BATCH), "classes": (1, 8, 1024)},
)
"""Least, best and largest size of each free dimension: one profile for a single tile, which then
gets kernels of its own, and one for batches."""


def build_plans(bundle: Bundle) -> Iterator[tuple[str, Path]]:
    """Build the plan of each graph of a bundle, also where there is one.

    Yields:
        The name of a graph and its plan, as soon as that is built.

    Raises:
        BackendError: TensorRT or the GPU can't be used, or TensorRT can't build a graph.
    """
    target = find_target()
    if bundle.manifest["precision"] == "int8":
        raise BackendError(
            f"{bundle.path.name}: a bundle in int8 is for CPUs: export one for TensorRT with "
            f"cdt-export --fp16"
        )
    folder = plans_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"{folder}: can't be written ({error.strerror}): set CDT_CACHE"
        ) from error
    for name in bundle.manifest["graphs"]:
        graph = bundle.read(f"{name}.onnx")
        require_whole(graph, f"{name}.onnx")
        path = plan_path(folder, sha256(graph), target)
        with first_device().current():
            plan = build_plan(graph, folder / f"{target.key('timings')}.timings")
        write_plan(path, plan, {"graph": name, **asdict(target)})
        yield name, path


def build_plan(graph: bytes, timings: Path) -> Plan:
    """Build the engine of one graph, in exactly the types that the graph names.

    Args:
        graph: bytes of a single-file ONNX model.
        timings: file of kernels' times on this GPU; what is in it is not measured again.

    Raises:
        BackendError: TensorRT can't.
    """
    trt = load_tensorrt()
    builder = made(trt.Builder, logger())
    # In 11 networks are always strongly typed and the flag says nothing; in 10 it is needed.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = require(builder.create_network(typed), "make a network")
    _parse(trt, network, graph)
    inputs = _inputs(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 stays what it is
    _add_profiles(builder, config, inputs)
    _take_timings(config, timings)
    engine = require(builder.build_serialized_network(network, config), "build a plan")
    write_whole(timings, bytes(config.get_timing_cache().serialize()))
    return Plan(inputs, bytes(engine))


def _parse(trt: Any, network: Any, graph: bytes) -> None:
    parser = made(trt.OnnxParser, network, logger())
    if not parser.parse(graph):
        wrong = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise BackendError(f"TensorRT can't read the graph: {' '.join(wrong.split())[:300]}")


def _inputs(trt: Any, network: Any) -> dict[str, Input]:
    tensors = (network.get_input(index) for index in range(network.num_inputs))
    return {
        tensor.name: Input(
            tuple(
                tensor.get_dimension_name(place) if size < 0 else int(size)
                for place, size in enumerate(tensor.shape)
            ),
            np.dtype(trt.nptype(tensor.dtype)),
        )
        for tensor in tensors
    }


def _add_profiles(builder: Any, config: Any, inputs: Mapping[str, Input]) -> None:
    """Say how large the free dimensions may be; a graph without any needs no profile."""
    free = {name: one for name, one in inputs.items() if _is_free(one)}
    for ranges in RANGES if free else ():
        profile = builder.create_optimization_profile()
        for name, one in free.items():
            sizes = [_sized(name, one, ranges, place) for place in range(3)]
            profile.set_shape(name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT can't take a profile of {', '.join(free)}")


def _sized(name: str, one: Input, ranges: Mapping[str, Any], place: int) -> tuple[int, ...]:
    unknown = [size for size in one.shape if isinstance(size, str) and size not in ranges]
    if unknown:
        raise BackendError(
            f"input {name}: free dimension {unknown[0]!r}: expected one of {', '.join(ranges)}"
        )
    return tuple(ranges[size][place] if isinstance(size, str) else size for size in one.shape)


def _is_free(one: Input) -> bool:
    return any(isinstance(size, str) for size in one.shape)


def _take_timings(config: Any, path: Path) -> None:
    """Use what was measured before; a file that TensorRT does not take is begun anew."""
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
