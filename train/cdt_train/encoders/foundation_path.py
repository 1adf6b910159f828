"""A foundation encoder as the tile encoder itself, frozen or with low-rank changes.

Its weights are shared by every copy of the model and stand in no checkpoint: they are found again
by their identity. What is learnt are the projection and, where asked for, the changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.errors import RecipeError
from cdt_runtime.preprocess import resize_matrix
from cdt_train.encoders.conv2d import unit_scale
from cdt_train.encoders.foundation import FoundationEncoder

SIDE = 4
"""Tokens along the side of a tile that the encoder's own are averaged to."""

ADAPTED = ("q_proj", "v_proj", "query", "value", "qkv")
"""Layers that low-rank changes are made to: what attention asks and what it passes on."""


class FoundationPath(nn.Module):
    """Tiles to tokens by a foundation encoder.

    A tile is resized by fixed weights and standardised inside, so that the graph takes in bytes.

    Args:
        encoder: of tiles; not changed.
        feature_dim: C, width of a token.
        rank: of the changes; 0 for none.

    Raises:
        RecipeError: there is no layer to change.

    Source: LoRA, Hu et al. 2022.
    """

    scales = 1

    def __init__(self, encoder: FoundationEncoder, feature_dim: int, rank: int = 0) -> None:
        super().__init__()
        self.feature_dim, self.card = feature_dim, encoder.card
        self._shared = _Shared(encoder.module)
        layers = _adapted(encoder.module) if rank else {}
        if rank and not layers:
            raise RecipeError(
                f"model.lora_rank: {encoder.card.key} has none of the layers {', '.join(ADAPTED)}: "
                f"0 leaves it frozen"
            )
        self._layers = tuple(layers)
        self.down = nn.ParameterList(
            nn.Parameter(layer.weight.new_empty(rank, layer.in_features).normal_(std=0.02))
            for layer in layers.values()
        )
        self.up = nn.ParameterList(
            nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
            for layer in layers.values()
        )
        width = self.card.token_dim or self.card.embedding_dim
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, feature_dim))

    def standardise_by(self, tiles: Tensor) -> None:
        """Do nothing: a foundation encoder brings its own mean and spread."""

    def forward(self, tile: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tile: `(B, 3, S, S)`, uint8 in 0 to 255 or float in 0 to 1.

        Returns:
            `(B, N, C)` tokens in rows from the top left; one where the encoder gives none.
        """
        module = self._shared.on(tile.device)
        changed = self._changed(module)
        images = prepared(tile, self.card)
        if changed:
            found = torch.func.functional_call(module, changed, (images,))
        else:
            with torch.no_grad():
                found = module(images)
        return self._tokens(found)

    def merged(self) -> nn.Module:
        """Return a copy for export, the changes added to the weights, with no weight outside it."""
        return _Merged(self)

    def _tokens(self, found: tuple[Tensor, ...]) -> Tensor:
        tokens = found[0][:, None] if self.card.token_dim is None else quarters(found[1])
        projected: Tensor = self.project(tokens)
        return projected

    def _changed(self, module: nn.Module) -> dict[str, Tensor]:
        own = dict(module.named_parameters())
        return {
            f"{name}.weight": own[f"{name}.weight"] + up @ down
            for name, down, up in zip(self._layers, self.down, self.up, strict=True)
        }


class _Merged(nn.Module):
    def __init__(self, path: FoundationPath) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(path._shared.module).cpu()
        self.card, self.project = path.card, copy.deepcopy(path.project)
        with torch.no_grad():
            for name, weight in path._changed(path._shared.module).items():
                self.encoder.get_parameter(name).copy_(weight)

    def forward(self, tile: Tensor) -> Tensor:
        found = self.encoder(prepared(tile, self.card))
        tokens = found[0][:, None] if self.card.token_dim is None else quarters(found[1])
        projected: Tensor = self.project(tokens)
        return projected


class _Shared:
    """A module that copies of its holder share, and that no state holds."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def on(self, device: torch.device) -> nn.Module:
        own = next(self.module.parameters(), None)
        if own is not None and own.device != device:
            self.module.to(device)
        return self.module


def prepared(tile: Tensor, card: EncoderCard) -> Tensor:
    """Bring tiles `(B, 3, S, S)` to the encoder's size and range."""
    spec = card.input
    scaled = unit_scale(tile)
    matrix = torch.from_numpy(resize_matrix(tile.shape[-1], spec.size).copy()).to(tile.device)
    sized = matrix @ scaled @ matrix.T
    shape = (1, 3, 1, 1)
    mean, std = (
        torch.tensor(values, device=tile.device).view(shape) for values in (spec.mean, spec.std)
    )
    images = (sized - mean) / std
    return images.permute(0, 2, 3, 1) if spec.layout == "NHWC" else images


def quarters(tokens: Tensor) -> Tensor:
    """Average tokens `(B, N, D)` over a grid of `SIDE` by `SIDE`, or keep those that form none."""
    count = tokens.shape[1]
    side = round(count**0.5)
    if side * side != count or side <= SIDE:
        return tokens
    weights = torch.from_numpy(resize_matrix(side, SIDE).copy()).to(tokens)
    grid = tokens.reshape(-1, side, side, tokens.shape[2])
    pooled = torch.einsum("ai,bj,nijd->nabd", weights, weights, grid)
    return pooled.flatten(1, 2)


def _adapted(module: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ADAPTED
    }
