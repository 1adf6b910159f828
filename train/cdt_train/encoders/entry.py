"""How a foundation encoder is described: one file makes one `Entry`, `registry.ENCODERS` lists it.

Nothing heavy is imported here, nor by the files that make entries before one of their functions is
called: the list of encoders must come up in an instant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdt_runtime.encoder_card import EncoderCard

if TYPE_CHECKING:
    from torch import nn


SLICES = "slices:"
"""Before the key of an encoder of tiles: it looks at the slices of a CT."""

SHOWN_AS = "@"
"""Between a key and the name of one of the card's `options`."""


@dataclass(frozen=True)
class Entry:
    """How an encoder is made.

    Attributes:
        card: of the encoder at its full size.
        tiny: of a small one of the same architecture, for tests and trials without weights.
        random: makes the full or the tiny net, its weights drawn from torch's random state.
        load: makes the full net with weights from a folder or file; a tensor that is missing there
            is a `CheckpointError`.
        files: one of these must be in a folder for it to hold the weights, globs.
    """

    card: EncoderCard
    tiny: EncoderCard
    random: Callable[[EncoderCard], nn.Module]
    load: Callable[[Path, EncoderCard], nn.Module]
    files: tuple[str, ...] = ("*.safetensors",)

    @property
    def folder(self) -> str:
        """Key of the encoder itself, however images are shown to it: its weights are the same."""
        return self.card.key.removeprefix(SLICES).partition(SHOWN_AS)[0]


def random_card(entry: Entry, *, tiny: bool, seed: int) -> EncoderCard:
    """Return the card of an encoder with random weights, marked as such."""
    card = entry.tiny if tiny else entry.card
    identity = f"random-weights-{seed}{'-tiny' if tiny else ''}"
    return replace(card, origin="random-weights", weights_sha256=identity, verified="random")
