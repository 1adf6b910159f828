"""TensorRT's plans on disk: engines that were built for one GPU, and run nowhere else.

A plan is a file in the folder `plans` of the cache: one line of JSON that says what it is, then
what TensorRT serialised. It is named by all that it hangs on, so that another GPU, driver, version
of TensorRT or graph is a miss, never a wrong hit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.backends.device import first_device
from cdt_runtime.backends.shapes import Input
from cdt_runtime.backends.trt_library import load_tensorrt
from cdt_runtime.cache import cache_dir
from cdt_runtime.errors import BackendError
from cdt_runtime.files import replace_synced

BUILD = "build it with cdt-doctor --build BUNDLE"

VERSION = 1
"""Raised when the same graph is built in another way than before."""


@dataclass(frozen=True)
class Target:
    """What a plan runs on.

    Attributes:
        gpu: name and compute capability.
        driver: the CUDA version of the driver, such as 13000.
        tensorrt: the version.
    """

    gpu: str
    driver: int
    tensorrt: str

    def __str__(self) -> str:
        return f"{self.gpu} with TensorRT {self.tensorrt}, CUDA driver {self.driver}"

    def key(self, *parts: object) -> str:
        """Return the first 16 digits of the hash of this and of what else a file hangs on."""
        text = json.dumps([VERSION, asdict(self), *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """A built engine.

    Attributes:
        inputs: what the graph takes, by name.
        engine: what TensorRT serialised.
    """

    inputs: Mapping[str, Input]
    engine: bytes


def find_target() -> Target:
    """Say what plans must be built for here.

    Raises:
        BackendError: TensorRT or the GPU can't be used.
    """
    version = load_tensorrt().__version__
    device = first_device()
    return Target(device.name, device.driver, version)


def plans_folder() -> Path:
    """Return the folder of the plans.

    Raises:
        BackendError: there is no cache folder.
    """
    folder = cache_dir()
    if folder is None:
        raise BackendError("backend 'tensorrt': no cache folder for its plans: set CDT_CACHE")
    return folder / "plans"


def plan_path(folder: Path, graph_sha256: str, target: Target) -> Path:
    """Name the plan of a graph; it starts with the graph's hash, which tells without a GPU."""
    return folder / f"{graph_sha256[:16]}-{target.key(graph_sha256)}.plan"


def write_plan(path: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Write a plan in one step.

    Args:
        path: where; the folder is there.
        plan: what TensorRT built.
        facts: what else its first line is to say.

    Raises:
        BackendError: the folder can't be written.
    """
    inputs = {name: [one.dtype.name, one.shape] for name, one in plan.inputs.items()}
    digest = hashlib.sha256(plan.engine).hexdigest()
    head = json.dumps({**facts, "inputs": inputs, "sha256": digest})
    write_whole(path, head.encode() + b"\n" + plan.engine)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step.

    Raises:
        BackendError: the folder can't be written.
    """
    try:
        replace_synced(path, content)
    except OSError as error:
        raise BackendError(f"{path}: can't be written ({error.strerror}): set CDT_CACHE") from error


def read_plan(graph_sha256: str, target: Target) -> Plan:
    """Read the plan of a graph.

    Raises:
        BackendError: it has not been built for this target, or is damaged.
    """
    path = plan_path(plans_folder(), graph_sha256, target)
    try:
        head, _, engine = path.read_bytes().partition(b"\n")
    except OSError:
        raise BackendError(
            f"backend 'tensorrt': no plan for this graph on {target}: {BUILD}"
        ) from None
    facts = _facts(head)
    if facts is None or hashlib.sha256(engine).hexdigest() != facts["sha256"]:
        raise BackendError(f"backend 'tensorrt': {path.name} is damaged: {BUILD}")
    inputs = {
        name: Input(tuple(shape), np.dtype(kind)) for name, (kind, shape) in facts["inputs"].items()
    }
    return Plan(inputs, engine)


def built(graphs: Sequence[str]) -> str | None:
    """Tell whether all plans of a bundle are there, without loading them.

    Where none was ever built, not even the GPU is asked.

    Args:
        graphs: the SHA-256 of each graph.

    Returns:
        What tells these plans from any others; None where one is missing.
    """
    try:
        folder = plans_folder()
        if not all(any(folder.glob(f"{graph[:16]}-*.plan")) for graph in graphs):
            return None
        target = find_target()
    except BackendError:
        return None
    digests = [_digest(plan_path(folder, graph, target)) for graph in graphs]
    return None if None in digests else " ".join(map(str, digests))


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            facts = _facts(file.readline())
    except OSError:
        return None
    return str(facts["sha256"]) if facts else None


def _facts(head: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(head)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"sha256", "inputs"} <= set(found) else None
