"""The foundation encoders that a recipe names, ready to look at tiles and CT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.cache import TokenCache, cache_dir
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoder_features import feature_shape
from cdt_runtime.encoders import Encode, Encoders
from cdt_runtime.errors import CheckpointError, RecipeError
from cdt_train.config import ModelRecipe
from cdt_train.encoders.foundation import FoundationEncoder
from cdt_train.encoders.registry import TINY_RANDOM, entry_of, identified, load_encoder

if TYPE_CHECKING:
    from cdt_train.encoders.foundation_path import FoundationPath

Float = NDArray[np.float32]
HOUSE = "conv2d"
HAIDEF = ("medsiglip", "medgemma", "path-foundation")


def encoder_keys(recipe: ModelRecipe) -> tuple[str, ...]:
    """List the encoders of a recipe, each once.

    Raises:
        RecipeError: weights are given for one that is not among them.
    """
    keys = tuple(dict.fromkeys([*(HAIDEF if recipe.use_haidef else ()), *recipe.encoders]))
    odd = [key for key in recipe.encoder_weights if key not in (*keys, recipe.path_encoder)]
    if odd:
        raise RecipeError(
            f"model.encoder_weights: {odd[0]!r} is not among model.encoders: add it there"
        )
    return keys


def feature_shapes(recipe: ModelRecipe) -> dict[str, dict[str, tuple[int, int]]]:
    """Return `tile_features` and `ct_features` as `build_model` takes them; nothing is loaded.

    Raises:
        RecipeError: an encoder is unknown, or looks at neither.
    """
    shapes: dict[str, dict[str, tuple[int, int]]] = {"tile_features": {}, "ct_features": {}}
    for key in encoder_keys(recipe):
        entry = entry_of(key)
        card = entry.tiny if recipe.encoder_weights.get(key) == TINY_RANDOM else entry.card
        if card.modality not in ("tile", "ct"):
            raise RecipeError(f"model.encoders: {key} looks at {card.modality}, not at tiles or CT")
        shapes[f"{card.modality}_features"][key] = feature_shape(card)
    return shapes


def chosen_encoders(
    recipe: ModelRecipe, expected: Sequence[Mapping[str, Any]] | None = None
) -> Encoders:
    """Find the encoders of a recipe; each is loaded when something is not in the cache.

    Args:
        recipe: names them.
        expected: cards of those that a model was trained with; None where it is to be trained.

    Raises:
        CheckpointError: weights are missing, or others than the model was trained with.
        MissingDependencyError: a library that one needs is not installed.
    """
    cards = [_card(recipe, key) for key in encoder_keys(recipe)]
    known = {one["key"]: one["weights_sha256"] for one in expected or ()}
    for card in cards if expected is not None else ():
        _require_same(card, known.get(card.key))
    return Encoders(
        cards, lambda card: as_encode(load_chosen(recipe, card.key)), TokenCache(cache_dir())
    )


def _card(recipe: ModelRecipe, key: str) -> EncoderCard:
    given = recipe.encoder_weights.get(key)
    return identified(key, given, allow_network=recipe.allow_download)


def chosen_path_encoder(recipe: ModelRecipe, channels: int, seed: int) -> FoundationPath | None:
    """Make the tile encoder where it is a foundation encoder; None for the house's own.

    Raises:
        RecipeError: tiles are not RGB, or it does not look at tiles.
        CheckpointError: its weights are missing.
    """
    key = recipe.path_encoder
    if key == HOUSE:
        if recipe.lora_rank:
            raise RecipeError(f"model.lora_rank: {recipe.lora_rank}: {HOUSE} learns as a whole")
        return None
    if channels != 3:
        raise RecipeError(f"model.path_encoder: {key} takes R, G, B; the tiles have {channels}")
    if entry_of(key).card.modality != "tile":
        raise RecipeError(f"model.path_encoder: {key} does not look at tiles")
    import torch

    from cdt_train.encoders.foundation_path import FoundationPath

    encoder = _kept(key, recipe.encoder_weights.get(key), recipe.allow_download)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FoundationPath(encoder, recipe.feature_dim, recipe.lora_rank)


def path_card(recipe: ModelRecipe, expected: Mapping[str, Any] | None = None) -> EncoderCard | None:
    """Return the card of a foundation encoder that is the tile encoder; None for the house's own.

    Args:
        recipe: names it.
        expected: card of the one that a model was trained with.

    Raises:
        CheckpointError: its weights are missing, or others.
    """
    if recipe.path_encoder == HOUSE:
        return None
    card = _card(recipe, recipe.path_encoder)
    if expected is not None:
        _require_same(card, expected["weights_sha256"])
    return card


@lru_cache(maxsize=1)
def _kept(key: str, weights: str | None, allow_network: bool) -> FoundationEncoder:
    """Load an encoder once for all copies of a model."""
    return load_encoder(key, weights, allow_network=allow_network)


def _require_same(card: EncoderCard, identity: str | None) -> None:
    if identity != card.weights_sha256:
        raise CheckpointError(
            f"encoder {card.key}: its weights are not those that the model was trained with: "
            f"give them with model.encoder_weights, or $CDT_WEIGHTS/{card.key}"
        )


def load_chosen(recipe: ModelRecipe, key: str) -> FoundationEncoder:
    """Load one of the encoders of a recipe; errors are those of `load_encoder`."""
    given = recipe.encoder_weights.get(key)
    return load_encoder(key, given, allow_network=recipe.allow_download)


def as_encode(encoder: FoundationEncoder) -> Encode:
    """Let a PyTorch encoder take and give numpy arrays."""
    import torch

    def encode(images: Float) -> tuple[Float, Float | None]:
        found = encoder.encode(torch.from_numpy(images))
        return found.embedding.numpy(), None if found.tokens is None else found.tokens.numpy()

    return encode
