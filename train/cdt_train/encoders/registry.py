"""Every foundation encoder by its key: one file and one line add one.

    KEY            an encoder of `ENCODERS`
    timm:NAME      any model of timm that gives features
    slices:KEY     a tile encoder that looks at the slices of a CT
    KEY@OPTION     one to which images are shown in another way that was published

Nothing falls back: weights are there whole, or it is an error. Random weights are made only where
they are asked for by name, and are marked in all that is made with them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.errors import RecipeError
from cdt_train.encoders import dinov2, medgemma, medsiglip, monai_nets, path_foundation, timm_vits
from cdt_train.encoders.entry import SHOWN_AS, SLICES, Entry, random_card
from cdt_train.encoders.look_up import require_weights, weights_identity

if TYPE_CHECKING:
    from cdt_train.encoders.foundation import FoundationEncoder

_ENTRIES: tuple[Entry, ...] = (
    medsiglip.ENTRY,
    medgemma.ENTRY,
    path_foundation.ENTRY,
    *dinov2.ENTRIES,
    *timm_vits.ENTRIES,
    *monai_nets.ENTRIES,
)
ENCODERS: dict[str, Entry] = {entry.card.key: entry for entry in _ENTRIES}

TINY_RANDOM = "tiny-random"
"""In place of a path of weights: a tiny encoder of the same architecture that knows nothing."""


def entry_of(key: str) -> Entry:
    """Find an encoder.

    Raises:
        RecipeError: there is none of that name.
    """
    if key in ENCODERS:
        return ENCODERS[key]
    bare, mark, option = key.partition(SHOWN_AS)
    if mark:
        return _shown_as(entry_of(bare), option)
    if key.startswith(timm_vits.PREFIX):
        return timm_vits.any_model(key)
    if key.startswith(SLICES):
        return _of_slices(entry_of(key.removeprefix(SLICES)))
    near = difflib.get_close_matches(key, ENCODERS, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]}?" if near else f": the encoders are {', '.join(ENCODERS)}"
    raise RecipeError(f"encoder {key!r}: unknown{hint}")


def _of_slices(entry: Entry) -> Entry:
    """Let an encoder of tiles look at the slices of a CT, each in three windows as colours.

    Raises:
        RecipeError: it looks at something else.
    """
    if entry.card.modality != "tile":
        raise RecipeError(f"encoder {SLICES}{entry.card.key}: {entry.card.key} is none of tiles")

    def shown(card: EncoderCard) -> EncoderCard:
        seen = replace(card.input, volume=medgemma.WINDOWS, mpp=())
        return replace(card, key=f"{SLICES}{card.key}", modality="ct", input=seen, options={})

    return _renamed(entry, shown)


def _shown_as(entry: Entry, option: str) -> Entry:
    """Show images to an encoder in another of the ways that were published.

    Raises:
        RecipeError: there is none of that name.
    """
    known = entry.card.options
    if option not in known:
        raise RecipeError(
            f"encoder {entry.card.key}{SHOWN_AS}{option}: {option!r} is none of the published "
            f"ways to prepare images for it: {', '.join(known) or 'there is one alone'}"
        )
    return _renamed(
        entry,
        lambda card: replace(
            card, key=f"{card.key}{SHOWN_AS}{option}", input=card.options[option], options={}
        ),
    )


def _renamed(entry: Entry, change: Callable[[EncoderCard], EncoderCard]) -> Entry:
    """Describe the same net under a card of another key and input."""

    def own(card: EncoderCard) -> EncoderCard:
        return replace(card, key=entry.card.key, modality=entry.card.modality)

    return Entry(
        change(entry.card),
        change(entry.tiny),
        lambda card: entry.random(own(card)),
        lambda path, card: entry.load(path, own(card)),
        entry.files,
    )


def load_encoder(
    key: str, weights: str | Path | None = None, *, allow_network: bool = False, seed: int = 0
) -> FoundationEncoder:
    """Load an encoder with its weights, or make a tiny random one where that is asked for.

    Args:
        key: of the encoder.
        weights: a folder or file; `TINY_RANDOM`; or None to look for them.
        allow_network: fetch what is not on this machine.
        seed: of random weights.

    Raises:
        RecipeError: no such encoder.
        MissingDependencyError: a library that it needs is not installed.
        CheckpointError: its weights are missing, or lack a tensor.
    """
    from cdt_train.encoders.foundation import FoundationEncoder, frozen, made_random

    entry = entry_of(key)
    if weights == TINY_RANDOM:
        return made_random(entry, tiny=True, seed=seed)
    path = require_weights(entry, Path(weights) if weights else None, allow_network=allow_network)
    return FoundationEncoder(_with_weights(entry, path), frozen(entry.load(path, entry.card)))


def identified(
    key: str, weights: str | Path | None = None, *, allow_network: bool = False, seed: int = 0
) -> EncoderCard:
    """Return the card that `load_encoder` would give, without loading anything heavy.

    Raises:
        CdtError: as `load_encoder` does.
    """
    entry = entry_of(key)
    if weights == TINY_RANDOM:
        return random_card(entry, tiny=True, seed=seed)
    path = require_weights(entry, Path(weights) if weights else None, allow_network=allow_network)
    return _with_weights(entry, path)


def _with_weights(entry: Entry, path: Path) -> EncoderCard:
    return replace(entry.card, origin="weights", weights_sha256=weights_identity(path))
