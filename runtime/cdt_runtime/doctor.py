"""What this machine has and what runs on it: the facts behind `cdt-doctor`."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cdt_runtime import __version__
from cdt_runtime.backends import BACKENDS, open_session
from cdt_runtime.backends.session import Backend
from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import cache_dir
from cdt_runtime.cores import available_cores
from cdt_runtime.errors import BackendError
from cdt_runtime.proof import Outcome, examine, fastest

CPUINFO = Path("/proc/cpuinfo")
NVIDIA = Path("/proc/driver/nvidia")

FEATURES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve"),
)
"""What makes inference faster, as Linux names it: x86-64, then ARM from `asimddp` on."""

PACKAGES = ("numpy", "pydicom", "imagecodecs", "pillow", "safetensors")
"""What every answer goes through, beside the engines."""

ONE_NODE = (
    b'\x08\n:5\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x03oneZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
"""An ONNX model, y = Relu(x) of one float: what an engine is tried on where there is no bundle."""


@dataclass(frozen=True)
class Engine:
    """An engine on this machine.

    Attributes:
        name: key of `BACKENDS`.
        packages: version of each installed distribution that it needs or that provides it.
        works: whether it runs, and passes the self-test where there is a bundle.
        problem: why not.
        precision: the lowest it was tried in; None without a bundle.
        gap: largest difference of an output in the self-test, as a share of its range.
        tile_ms: what one tile takes.
    """

    name: str
    packages: dict[str, str]
    works: bool
    problem: str | None = None
    precision: str | None = None
    gap: float | None = None
    tile_ms: float | None = None


def report(bundle: Bundle | None) -> dict[str, Any]:
    """Examine the machine and every engine; with a bundle, test and time each on it anew.

    Returns:
        What `cdt-doctor --json` prints.
    """
    folder = cache_dir()
    outcomes = examine(bundle, "auto", folder, anew=True) if bundle else []
    passed = [one for one in outcomes if not one.refused]
    return {
        "version": __version__,
        "machine": machine(),
        "packages": _versions(PACKAGES),
        "cache": str(folder) if folder else None,
        "bundle": _bundle_facts(bundle) if bundle else None,
        "engines": [asdict(one) for one in _engines(bundle, outcomes)],
        "auto": fastest(passed).backend if passed else None,
    }


def machine() -> dict[str, Any]:
    """Processor, memory and GPUs, as far as the system tells."""
    text = CPUINFO.read_text("utf-8", "replace") if CPUINFO.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, flags=re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": model[1].strip() if model else platform.machine(),
        "features": [name for name in FEATURES if name in known],
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **_gpus(),
    }


def _engines(bundle: Bundle | None, outcomes: Sequence[Outcome]) -> list[Engine]:
    """All engines in the order of `BACKENDS`; what was not tested is opened."""
    tested = {one.backend: one for one in outcomes}
    return [
        _tested(tested[name], backend) if name in tested else _opened(name, backend, bundle)
        for name, backend in BACKENDS.items()
    ]


def _tested(outcome: Outcome, backend: Backend) -> Engine:
    return Engine(
        outcome.backend,
        _versions(backend.packages),
        not outcome.refused,
        outcome.refused or None,
        outcome.precision,
        outcome.gap,
        outcome.tile_ms,
    )


def _opened(name: str, backend: Backend, bundle: Bundle | None) -> Engine:
    """Open an engine that was not tested: there is no bundle, or it is not there."""
    graph = bundle.read("tile_classifier.onnx") if bundle else ONE_NODE
    try:
        open_session(name, graph)
    except BackendError as error:
        return Engine(name, _versions(backend.packages), False, str(error))
    return Engine(name, _versions(backend.packages), True)


def _bundle_facts(bundle: Bundle) -> dict[str, str]:
    return {
        "path": str(bundle.path),
        "identity": bundle.identity,
        "precision": bundle.manifest["precision"],
    }


def _gpus() -> dict[str, Any]:
    """NVIDIA GPUs and the version of their driver."""
    texts = (path.read_text("utf-8", "replace") for path in NVIDIA.glob("gpus/*/information"))
    names = [re.search(r"^Model:\s*(.+)$", text, flags=re.MULTILINE) for text in texts]
    version = NVIDIA / "version"
    text = version.read_text("utf-8", "replace") if version.is_file() else ""
    driver = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return {
        "gpus": [name[1].strip() for name in names if name],
        "driver": driver[1] if driver else None,
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
