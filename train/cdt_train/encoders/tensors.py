"""Tensors of large safetensors files: those that are asked for, and all of those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cdt_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

Rename = Callable[[str], str | None]
"""A tensor's name in a file to its name in the network; None leaves it where it is."""


def read_tensors(path: Path, rename: Rename) -> dict[str, Tensor]:
    """Read some tensors of a safetensors file, or of all such files in a folder.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                    if (own := rename(name)) is not None:
                        found[own] = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors: fetch it again") from error
    return found


def behind(*marks: str) -> Rename:
    """Keep names that hold one of the marks, from the mark on."""

    def rename(name: str) -> str | None:
        for mark in marks:
            place = name.find(mark)
            if place == 0 or (place > 0 and name[place - 1] == "."):
                return name[place:]
        return None

    return rename


def load_exactly(net: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Load weights so that every tensor of the network gets its own, in its type.

    Raises:
        CheckpointError: one is missing or of another shape.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{origin}: lacks {len(missing)} of {len(own)} tensors, first "
            f"{', '.join(missing[:3])}: give the weights of this encoder"
        )
    for name, value in own.items():
        if tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{origin}: {name} is {tuple(tensors[name].shape)}, expected "
                f"{tuple(value.shape)}: give the weights of this encoder"
            )
    net.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own})
