"""The choice of the engine: the fastest that is there and has passed the self-test on this machine.

The outcome of a self-test is a small file in the cache folder, named by all that it hangs on: the
bundle, the engine and its version, the precision and the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cdt_runtime import __version__
from cdt_runtime.backends import BACKENDS, Precision
from cdt_runtime.bundle import Bundle
from cdt_runtime.errors import BackendError, ParityError
from cdt_runtime.files import write_synced
from cdt_runtime.golden import self_test

EXACT: Precision = "fp32"


@dataclass(frozen=True)
class Choice:
    """What to run graphs on.

    Attributes:
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.
        notes: why each faster engine that is there was passed over, one line each.
    """

    backend: str
    precision: Precision
    notes: tuple[str, ...] = ()


def choose_backend(bundle: Bundle, precision: Precision, folder: Path | None) -> Choice:
    """Choose the first engine, in order of speed, that passes the bundle's self-test.

    An engine whose fastest precision fails is tried in `fp32` before the next one.

    Args:
        bundle: an opened bundle.
        precision: the lowest that is allowed, as `open_session` takes it.
        folder: where outcomes are kept; None tests anew each time.

    Raises:
        BackendError: none can be used.
    """
    notes: list[str] = []
    for name in (name for name, backend in BACKENDS.items() if backend.present()):
        reason = ""
        for tried in dict.fromkeys((precision, EXACT)):
            try:
                reason = _refused(bundle, name, tried, folder)
            except BackendError as error:
                reason = str(error)
                break
            if not reason:
                return Choice(name, tried, tuple(notes))
        notes.append(f"{name} is not used: {reason}")
    raise BackendError(f"no engine can be used: {'; '.join(notes)}")


def _refused(bundle: Bundle, name: str, precision: Precision, folder: Path | None) -> str:
    """Why an engine must not be used for a bundle, by its self-test; empty where it may."""
    path = folder / f"{_key(bundle, name, precision)}.proof" if folder else None
    known = _read(path) if path else None
    if known is not None:
        return known
    try:
        facts: dict[str, Any] = {"refused": "", "gaps": self_test(bundle, name, precision)}
    except ParityError as error:
        facts = {"refused": str(error)}
    if path is not None:
        facts |= {"bundle": bundle.identity, "backend": name, "precision": precision}
        _write(path, json.dumps(facts, indent=1).encode())
    return str(facts["refused"])


def _read(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_bytes())["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):  # a folder that can't be written only costs time later
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(temporary, content)
        temporary.replace(path)


def _key(bundle: Bundle, name: str, precision: Precision) -> str:
    parts = (
        __version__,
        bundle.manifest["files"],
        name,
        [_version(package) for package in BACKENDS[name].packages],
        precision,
        platform.node(),
        platform.machine(),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
