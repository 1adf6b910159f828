"""Checkpoints: written whole or not at all, hashed, read without running code."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_runtime.files import replace_synced

_PARTIAL = ".partial"
_HASH = "content_sha256"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one.

    Raises:
        TrainingError: a tensor of the model is not finite.
        CheckpointError: the disk refuses it; an older file of that name stays.
    """
    _require_finite(path, content.get("model_state_dict", {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**content, _HASH: content_sha256(content)}
    try:
        replace_synced(path, lambda file: torch.save(whole, file))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror})") from error


def load_checkpoint(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """Read a checkpoint on the CPU, tensors and plain values only.

    Args:
        path: the file.
        needed: keys it must hold.

    Raises:
        CheckpointError: missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint: cdt-train writes it, or give another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names a dozen types for a damaged archive
        raise CheckpointError(
            f"{path}: not a readable checkpoint: it is damaged, or not made by cdt-train"
        ) from error
    absent = [key for key in needed if not isinstance(content, dict) or key not in content]
    if absent:
        raise CheckpointError(f"{path}: not a cdt-train checkpoint: lacks {', '.join(absent)}")
    said = content.pop(_HASH, None)
    if said is None:
        raise CheckpointError(f"{path}: carries no hash: an earlier version wrote it: train again")
    if said != content_sha256(content):
        raise CheckpointError(
            f"{path}: its content does not fit its hash: it was damaged, or changed after it was "
            "saved: copy it again, or train again"
        )
    return dict(content)


def content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of nested plain values and tensors, hexadecimal; the order of keys does not count."""
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """What a value is made of, each part with its kind and length before it."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"tensor {plain.dtype} {tuple(plain.shape)};".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"map {len(value)};".encode()
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)};".encode()
        for one in value:
            yield from _parts(one)
    elif isinstance(value, float):
        yield b"float " + struct.pack("<d", value)
    else:
        text = str(value).encode("utf-8", "surrogatepass")
        yield f"{type(value).__name__} {len(text)};".encode() + text


def load_weights(module: torch.nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    """Load weights that must fit one to one.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape.
    """
    own = module.state_dict()
    odd = sorted(set(own) ^ set(state))
    odd += [key for key in own if key in state and own[key].shape != state[key].shape]
    if odd:
        raise CheckpointError(
            f"{origin}: weights do not fit the model of this recipe, first at {odd[0]}: "
            f"use the recipe it was trained with"
        )
    module.load_state_dict(dict(state))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_synced(path, (json.dumps(content, indent=1) + "\n").encode())


def sweep_partial(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for stale in folder.glob(f".*{_PARTIAL}"):
        stale.unlink(missing_ok=True)


def _require_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{path.name}: {key} is not finite, nothing was saved: lower the learning rate"
            )
