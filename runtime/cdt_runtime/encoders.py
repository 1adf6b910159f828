"""The foundation encoders of a model, at work: tiles and CT in, the bridge's features out.

How an encoder runs is the caller's: training hands in PyTorch modules, the runtime sessions of
exported graphs. What they see and what becomes of their answers is decided here, once for both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoder_features import VERSION, feature_shape, feature_tokens, over_slices
from cdt_runtime.encoder_input import ct_slices, ct_volume, image_input
from cdt_runtime.errors import BackendError, TileError
from cdt_runtime.preprocess import centre_square, unit_range
from cdt_runtime.tile import RGB
from cdt_runtime.volume import Volume

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Encode = Callable[[Float], tuple[Float, Float | None]]
"""Prepared images `(B, ...)` to embeddings `(B, D)` and tokens `(B, N, Dt)`, or None for these."""

SLICES = 8
"""Slices of a CT that are encoded at a time: attention over all of them would need its square."""


class Encoders:
    """Foundation encoders by key; each is opened when it is first needed.

    Args:
        cards: of loaded or exported encoders.
        open_encoder: makes what runs one.
        cache: keeps the features of a CT, and of a tile where it is asked for.
    """

    def __init__(
        self,
        cards: Sequence[EncoderCard],
        open_encoder: Callable[[EncoderCard], Encode],
        cache: TokenCache,
    ) -> None:
        self.cards = {card.key: card for card in cards}
        self._open, self._cache = open_encoder, cache
        self._opened: dict[str, Encode] = {}

    def shapes(self, modality: str) -> dict[str, tuple[int, int]]:
        """Return the shape `(X, W)` of the features of each encoder that looks at this."""
        return {card.key: feature_shape(card) for card in self._of(modality)}

    @property
    def see_tiles(self) -> bool:
        """Whether any looks at tiles."""
        return bool(self._of("tile"))

    def images(
        self, pixels: NDArray[Any], bits: int, channels: Sequence[str], name: str
    ) -> dict[str, Float]:
        """Prepare one tile for each encoder of tiles.

        Args:
            pixels: `(H, W, M)`, as the tile's reader gives them; the centre square is taken.
            bits: significant bits of an integer sample.
            channels: of the tile.
            name: what an error calls it.

        Raises:
            TileError: it is not RGB.
        """
        shown = rgb_bytes(pixels, bits, channels, name)
        return {card.key: image_input(shown, card.input) for card in self._of("tile")}

    def of_images(self, images: Mapping[str, Float]) -> dict[str, Float]:
        """Encode prepared tiles.

        Args:
            images: by encoder `(B, ...)`.

        Returns:
            By encoder `(B, X, W)`.
        """
        return {key: self._features(self.cards[key], batch) for key, batch in images.items()}

    def of_tile(self, identity: str, images: Callable[[], Mapping[str, Float]]) -> dict[str, Float]:
        """Take the features of one tile from the cache, or encode it.

        Args:
            identity: of its pixels.
            images: prepares it, as `images` does; called only where something is not kept.

        Returns:
            By encoder `(X, W)`.
        """
        found: dict[str, Float] = {}
        prepared: Mapping[str, Float] | None = None
        for card in self._of("tile"):
            key = _cache_key(identity, card)
            kept = self._cache.get(key, feature_shape(card))
            if kept is None:
                prepared = prepared or images()
                kept = self._features(card, prepared[card.key][None])[0]
                self._cache.put(key, kept)
            found[card.key] = kept
        return found

    def of_volume(self, identity: str, volume: Callable[[], Volume]) -> dict[str, Float]:
        """Take the features of a CT from the cache, or encode it.

        Args:
            identity: of its series.
            volume: reads it; called only where something is not kept.

        Returns:
            By encoder `(X, W)`.

        Raises:
            SeriesError: it can't be used.
        """
        found: dict[str, Float] = {}
        for card in self._of("ct"):
            key = _cache_key(identity, card)
            kept = self._cache.get(key, feature_shape(card))
            if kept is None:
                kept = self._of_ct(card, volume())
                self._cache.put(key, kept)
            found[card.key] = kept
        return found

    def _of(self, modality: str) -> list[EncoderCard]:
        return [card for card in self.cards.values() if card.modality == modality]

    def _of_ct(self, card: EncoderCard, volume: Volume) -> Float:
        spec = card.input.volume
        if spec is None:
            raise BackendError(f"encoder {card.key}: its card does not say how it sees a CT")
        if spec.shape is not None:
            whole: Float = self._features(
                card, ct_volume(volume.hu, volume.spacing_mm, spec)[None]
            )[0]
            return whole
        shown = ct_slices(volume.hu, spec)
        parts = [
            self._features(card, np.stack([image_input(one, card.input) for one in part]))
            for part in (shown[n : n + SLICES] for n in range(0, len(shown), SLICES))
        ]
        return over_slices(np.concatenate(parts))

    def _features(self, card: EncoderCard, images: Float) -> Float:
        if card.key not in self._opened:
            self._opened[card.key] = self._open(card)
        found = feature_tokens(card, *self._opened[card.key](images))
        if found.shape[1:] != feature_shape(card) or not np.isfinite(found).all():
            raise BackendError(
                f"encoder {card.key}: gave {found.shape[1:]}, its card says {feature_shape(card)}, "
                f"or an answer that is not finite: it must not be used"
            )
        return found


def rgb_bytes(
    pixels: NDArray[Any], bits: int, channels: Sequence[str], name: str, *, whole: bool = False
) -> Bytes:
    """Show an RGB tile in bytes, `(H, W, 3)`: its centre square, or the whole of it.

    Raises:
        TileError: its channels are others.
    """
    if tuple(channels) != RGB:
        raise TileError(
            f"{name}: has the channels {', '.join(channels)}; foundation encoders take R, G, B: "
            f"train without model.encoders"
        )
    squared = pixels if whole else centre_square(pixels)
    if squared.dtype == np.uint8:
        return np.ascontiguousarray(squared)
    shown: Bytes = np.rint(unit_range(squared, bits, name=name) * 255).astype(np.uint8)
    return shown


def _cache_key(identity: str, card: EncoderCard) -> str:
    spec = json.dumps(card.to_dict()["input"], sort_keys=True)
    parts = ("features", VERSION, identity, card.key, card.weights_sha256, spec)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
