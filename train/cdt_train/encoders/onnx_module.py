"""Encoders that come as ONNX, and the stand-in for one of them, as PyTorch modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cdt_runtime.backends import open_session
from cdt_runtime.errors import BackendError, CheckpointError

PATCH = 14


class OnnxModule(nn.Module):
    """A graph from images to an embedding, run by ONNX Runtime.

    Args:
        file: of one input and one output.

    Attributes:
        onnx: the graph itself, which an export ships as it is.

    Raises:
        CheckpointError: it can't be run.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.onnx = file.read_bytes()
        try:
            self._session = open_session("onnxruntime", self.onnx)
        except BackendError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Encode images; `(embedding,)`."""
        array = np.ascontiguousarray(images.cpu().numpy())
        return (torch.from_numpy(self._session.run({"images": array})["embedding"]),)


class PatchTransformer(nn.Module):
    """A small vision transformer over images with channels last.

    Args:
        width: D, of tokens and embedding.
        size: side of an image.
        layers: number of blocks.
    """

    def __init__(self, width: int, size: int, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH * PATCH, width)
        self.places = nn.Parameter(0.1 * torch.randn(1, (size // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Encode images `(B, S, S, 3)`; `(embedding,)`."""
        side = images.shape[1] // PATCH
        cut = images.reshape(-1, side, PATCH, side, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
        tokens = self.patches(cut.reshape(-1, side * side, 3 * PATCH * PATCH)) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return (self.norm(tokens.mean(dim=1)),)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        parts = self.mixed(self.before(tokens)).reshape(batch, count, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        tokens = tokens + self.output(
            (weights @ value).transpose(1, 2).reshape(batch, count, width)
        )
        found: Tensor = tokens + self.mlp(self.between(tokens))
        return found
