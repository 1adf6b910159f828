"""Embeddings of many tiles in a context."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_train.models.transfer_model import TransferModel

BATCH = 64
Floats = NDArray[np.float32]


@torch.no_grad()
def tile_tokens(
    model: TransferModel,
    tiles: Tensor,
    device: torch.device,
    features: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Encode many tiles once, for any number of contexts.

    Args:
        model: put into evaluation mode.
        tiles: `(n, M, S, S)`.
        device: where the model lives.
        features: by foundation encoder `(n, X, W)`; those that are missing stay silent.

    Returns:
        `(n, N, C)`, then the tokens of foundation encoders.
    """
    model.eval()
    parts = []
    for start in range(0, len(tiles), BATCH):
        batch = slice(start, start + BATCH)
        said = {key: values[batch] for key, values in (features or {}).items()}
        some = tiles[batch].to(device, memory_format=torch.channels_last)
        parts.append(model.tile_tokens(some, said))
    return torch.cat(parts)


@torch.no_grad()
def embed_tokens(model: TransferModel, tokens: Tensor, context: tuple[Tensor, Tensor]) -> Floats:
    """Embed tile tokens in a context.

    Args:
        model: put into evaluation mode.
        tokens: `(n, N, C)`.
        context: tokens `(1 | n, T, C)` and presence `(1 | n,)`.

    Returns:
        `(n, E)` float32 unit vectors.
    """
    model.eval()
    ct, present = context
    parts = []
    for start in range(0, len(tokens), BATCH):
        batch = slice(start, start + BATCH)
        shared = len(ct) == 1
        parts.append(
            model.bridge(
                tokens[batch], ct if shared else ct[batch], present if shared else present[batch]
            )
        )
    result: Floats = torch.cat(parts).cpu().numpy()
    return result


@torch.no_grad()
def embed_tiles(
    model: TransferModel, tiles: Tensor, ct: Tensor | None, device: torch.device
) -> Floats:
    """Embed many tiles in the context of one CT.

    Args:
        model: put into evaluation mode.
        tiles: `(n, M, S, S)`.
        ct: `(1, W, D, S, S)` or None.
        device: where the model lives.

    Returns:
        `(n, E)` float32 unit vectors.
    """
    model.eval()
    context = model.context(None if ct is None else ct.to(device))
    return embed_tokens(model, tile_tokens(model, tiles, device), context)
