"""The CT of a patient as the graphs take it: tokens, read and encoded once, then kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_features import feature_layout, flat_features
from cdt_runtime.encoder_session import bundle_cards
from cdt_runtime.encoders import Encoders
from cdt_runtime.prediction import Context, CtUsed
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.reading import ScannedSeries, scan_series
from cdt_runtime.volume import Volume

Float = NDArray[np.float32]
RunCt = Callable[[dict[str, Float]], Float]
"""Runs the CT graph: its inputs to CT tokens."""

READER_VERSION = 2
"""Raised when the same series gives another CT input than before: cached tokens are then stale."""


class CtContexts:
    """Prepares contexts for one model and engine.

    Args:
        bundle: an opened bundle.
        cache: of tokens.
        encoders: foundation encoders, some of which may look at a CT.
        engine: what the answers of the graphs hang on.
        run: runs the CT graph.
    """

    def __init__(
        self, bundle: Bundle, cache: TokenCache, encoders: Encoders, engine: str, run: RunCt
    ) -> None:
        self._preprocess: Preprocess = bundle.preprocess
        self._shape = (1, *bundle.output_shape("ct_encoder", "ct_tokens"))
        self._layout = feature_layout(bundle_cards(bundle), "ct")
        self._encoder = (bundle.ct_encoder_sha256, *_heard(encoders), engine)
        self._cache, self._encoders, self._run = cache, encoders, run

    def none(self) -> Context:
        """The context without CT."""
        return Context(np.zeros(self._shape, np.float32), np.zeros(1, np.float32), "none", None, {})

    def of_volume(self, volume: Volume) -> Context:
        """Encode a volume that a caller made.

        Raises:
            SeriesError: it can't be used.
        """
        started = perf_counter()
        ct_input = self._preprocess.ct(volume)
        # What a caller made is known by its values alone.
        identity = hashlib.sha256(ct_input.tobytes()).hexdigest()
        return self._encoded(identity, volume, lambda: ct_input, lambda: volume, started)

    def of_folder(self, folder: Path, series_uid: str | None, allow_resample: bool) -> Context:
        """Read a series, or find its tokens in the cache.

        Raises:
            SeriesError: it can't be used.
        """
        started = perf_counter()
        preprocess = self._preprocess
        series = scan_series(
            folder,
            series_uid=series_uid,
            min_slices=preprocess.min_slices,
            allow_resample=allow_resample,
        )

        def read() -> Float:
            return self._input(series)

        return self._encoded(series.state, series, read, series.volume, started)

    def input_of_folder(self, folder: Path, series_uid: str | None, allow_resample: bool) -> Float:
        """Read a series as the CT encoder takes it, `(1, W, D, S, S)`.

        Raises:
            SeriesError: it can't be used.
        """
        return self._input(
            scan_series(
                folder,
                series_uid=series_uid,
                min_slices=self._preprocess.min_slices,
                allow_resample=allow_resample,
            )
        )

    def of_input(self, ct_input: Float, like: Context, name: str) -> Context:
        """Encode an input in another's place; nothing is kept.

        Args:
            ct_input: `(1, W, D, S, S)`.
            like: the context that it stands in for.
            name: that tells it from that one.
        """
        return replace(like, tokens=self._run({"ct": ct_input}), key=f"{like.key} {name}")

    @property
    def alone(self) -> bool:
        """Whether no foundation encoder looks at the CT, too."""
        return not self._layout

    def _input(self, series: ScannedSeries) -> Float:
        means = series.reduced(self._preprocess.ct_means_shape)
        return self._preprocess.ct_of_means(means)

    def _encoded(
        self,
        identity: str,
        ct: ScannedSeries | Volume,
        read: Callable[[], Float],
        whole: Callable[[], Volume],
        started: float,
    ) -> Context:
        """Take the tokens of a CT from the cache, or read and encode it."""
        key = self._key(identity)
        tokens = self._cache.get(key, self._shape)
        hit = tokens is not None
        timings: dict[str, float] = {}
        if tokens is None:
            inputs = {"ct": read()}
            timings["ct_read"] = _ms_since(started)
            started = perf_counter()
            if self._layout:
                said = self._encoders.of_volume(identity, whole)
                found = {name: values[None] for name, values in said.items()}
                inputs["ct_features"] = flat_features(self._layout, found, 1)
            tokens = self._run(inputs)
            timings["ct_encode"] = _ms_since(started)
            self._cache.put(key, tokens)
        else:
            timings["ct_read"] = _ms_since(started)
        used = CtUsed(ct.description, hit, ct.warnings)
        return Context(tokens, np.ones(1, np.float32), key, used, timings)

    def _key(self, identity: str) -> str:
        parts = [identity, *self._encoder, str(READER_VERSION)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _heard(encoders: Encoders) -> list[str]:
    cards = [card for card in encoders.cards.values() if card.modality == "ct"]
    return [f"{card.key} {card.weights_sha256}" for card in cards]


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1000.0
