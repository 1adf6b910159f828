"""Weights of a backbone: from a file that is named, whole, or permuted as a control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, RecipeError
from cdt_train.progress import say

CONTAINERS = ("model_state_dict", "state_dict", "model", "teacher", "student")
PROBED = 8
"""Names of a network whose prefix is looked for in a file."""

Weights = dict[str, Tensor]


def read_weights(path: Path) -> Weights:
    """Read tensors by name from a safetensors file or a torch checkpoint, without running code.

    Raises:
        CheckpointError: missing, damaged, or no tensors in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file: --weights takes an existing one")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors name a dozen types for a damaged file
        raise CheckpointError(
            f"{path}: not readable as weights: expected safetensors, or a torch file that holds "
            f"tensors alone"
        ) from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = content.items() if isinstance(content, Mapping) else ()
    found = {str(key): value for key, value in tensors if isinstance(value, Tensor)}
    if not found:
        raise CheckpointError(f"{path}: holds no tensors by name")
    return found


def load_backbone_weights(
    net: nn.Module, weights: Mapping[str, Tensor], origin: str, *, adapt_stem: bool = False
) -> None:
    """Load weights so that every tensor of the backbone gets one.

    Heads and other parts that the backbone lacks are left out, and said.

    Args:
        net: the network itself.
        weights: by name, perhaps with a prefix that all share.
        origin: where they come from, for messages.
        adapt_stem: sum or spread the input channels of the first convolution where they differ.

    Raises:
        CheckpointError: a tensor of the backbone is missing or of another shape.
    """
    own = net.state_dict()
    names = _names_in(weights, own)
    chosen = {key: weights[name] for key, name in names.items()}
    missing = [key for key in own if key not in chosen and "num_batches_tracked" not in key]
    if missing:
        raise CheckpointError(
            f"{origin}: lacks {len(missing)} of {len(own)} tensors of the backbone, first "
            f"{', '.join(missing[:3])}: give weights of this backbone, or another --backbone"
        )
    adapted = {key: _fitted(key, chosen[key], own[key], origin, adapt_stem) for key in chosen}
    net.load_state_dict(own | adapted)
    if len(weights) > len(chosen):
        say(f"{origin}: {len(weights) - len(chosen)} tensors left out that the backbone lacks")


def permuted(weights: Mapping[str, Tensor], seed: int) -> Weights:
    """Shuffle the values within each tensor: the scale of the weights stays, what they know goes.

    The control for any claim of transfer: what these gain over a random start is no knowledge.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        if value.is_floating_point()
        else value.clone()
        for key, value in weights.items()
    }


def _names_in(weights: Mapping[str, Tensor], own: Weights) -> dict[str, str]:
    """Find the names under which a file holds the tensors of a network, those that it holds.

    Either may have a prefix that all its names share: a wrapper's, or that of a larger model.
    """
    inner = "net." if own and all(key.startswith("net.") for key in own) else ""
    bare = {key: key.removeprefix(inner) for key in own}
    prefixes = {
        name.removesuffix(last)
        for last in list(bare.values())[:PROBED]
        for name in weights
        if name == last or name.endswith(f".{last}")
    }
    found = [
        {key: prefix + last for key, last in bare.items() if prefix + last in weights}
        for prefix in sorted(prefixes)
    ]
    return max(found, key=len, default={})


def _fitted(key: str, found: Tensor, own: Tensor, origin: str, adapt_stem: bool) -> Tensor:
    """Return `found` if it fits, with its input channels changed if that is asked for."""
    if found.shape == own.shape:
        return found
    if _is_stem(found, own):
        if not adapt_stem:
            raise CheckpointError(
                f"{origin}: {key} takes {found.shape[1]} channels, the images have {own.shape[1]}: "
                f"--adapt-stem sums or spreads them"
            )
        say(f"{origin}: {key} changed from {found.shape[1]} to {own.shape[1]} input channels")
        if own.shape[1] == 1:
            return found.sum(dim=1, keepdim=True)
        return found.expand_as(own) / own.shape[1]
    raise CheckpointError(
        f"{origin}: {key} is {tuple(found.shape)}, the backbone has {tuple(own.shape)}: give "
        f"weights of this backbone, or another --backbone"
    )


def _is_stem(found: Tensor, own: Tensor) -> bool:
    """Tell whether two convolutions differ in their input channels alone, 1 against 3."""
    alike = found.ndim == own.ndim >= 4 and found.shape[0] == own.shape[0]
    return alike and found.shape[2:] == own.shape[2:] and {found.shape[1], own.shape[1]} == {1, 3}


def load_transformers(
    library: Any, folder: Path, channels: int
) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """Load a vision model saved by transformers from a local folder.

    Args:
        library: the module transformers.
        folder: holds config.json and safetensors files.
        channels: of the images.

    Returns:
        The model, and the mean and spread that it expects of each channel.

    Raises:
        CheckpointError: no such folder, or weights are missing from it.
        RecipeError: the model takes another number of channels.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"backbone transformers:{folder}: no config.json there: give the folder that "
            f"save_pretrained wrote; nothing is downloaded"
        )
    try:
        net, report = library.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"backbone transformers:{folder}: can't be read: {first}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"backbone transformers:{folder}: lacks {len(missing)} tensors, first "
            f"{', '.join(missing[:3])}"
        )
    net = getattr(net, "vision_model", net)
    if getattr(net.config, "num_channels", channels) != channels:
        raise RecipeError(
            f"backbone transformers:{folder}: takes {net.config.num_channels} channels, the images "
            f"have {channels}"
        )
    return net, *_standardisation(folder)


def _standardisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return tuple(values.get("image_mean", (0.5,))), tuple(values.get("image_std", (0.5,)))
