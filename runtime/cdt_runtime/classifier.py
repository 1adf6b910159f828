"""The few-shot classifier: a bundle, an engine and prototypes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.backends import Session, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache, cache_dir
from cdt_runtime.ct import Volume, load_volume, scan_series
from cdt_runtime.errors import PrototypeError, TileError
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.prototypes import (
    FACTS,
    TENSORS,
    Prototypes,
    class_means,
    encode_labels,
    softmax,
)
from cdt_runtime.tile import Tile, match_channels, read_tile

Float = NDArray[np.float32]
TileLike = str | os.PathLike[str] | Tile | NDArray[Any]
CtLike = str | os.PathLike[str] | Volume | None

BATCH = 32
"""Tiles in one engine call: beyond it a CPU gains nothing and memory grows."""


@dataclass(frozen=True)
class CtUsed:
    """The CT context of a prediction.

    Attributes:
        series: size and spacing; never text or identifiers of the headers.
        cache_hit: whether its tokens came from the cache.
        warnings: what the reader had to mend or leave out.
    """

    series: str
    cache_hit: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one tile.

    Attributes:
        tile: the tile's name.
        label: the class, or None where it abstains.
        probabilities: calibrated probability of each class.
        distances: Euclidean distance to each prototype on the unit sphere, 0 to 2.
        abstained: whether it declines to answer.
        reason: why it abstains.
        ct: the CT context, or None.
        channels: for each model channel the file's channel, None where it was filled with zeros.
        warnings: what the user should know of this tile.
        timings_ms: milliseconds of each stage; the engine's time is shared by its batch.
    """

    tile: str
    label: str | None
    probabilities: dict[str, float]
    distances: dict[str, float]
    abstained: bool
    reason: str | None
    ct: CtUsed | None
    channels: dict[str, str | None]
    warnings: tuple[str, ...]
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def nearest(self) -> str:
        """The class with the nearest prototype, also where the answer is an abstention."""
        return min(self.distances, key=lambda name: self.distances[name])


@dataclass(frozen=True, eq=False)
class Context:
    """CT tokens as the bridge takes them.

    Attributes:
        tokens: `(1, T, C)` float32; zeros where there is no CT.
        present: `(1,)` float32, 1 with a CT and 0 without.
        key: identity of the tokens, for the prototypes of this context.
        used: what a prediction reports, or None.
        timings_ms: milliseconds of reading and encoding.
    """

    tokens: Float
    present: Float
    key: str
    used: CtUsed | None
    timings_ms: dict[str, float]


@dataclass(frozen=True, eq=False)
class TileInput:
    """A tile, ready for the graph, with what there is to say about it."""

    array: NDArray[Any]
    name: str
    sha256: str
    blank: bool
    channels: dict[str, str | None]
    warnings: tuple[str, ...]
    read_ms: float


class FewShotClassifier:
    """Classifies tiles by their distance to class prototypes, with a CT as context.

    Args:
        bundle: an opened bundle.
        backend: name of the inference engine, a key of `BACKENDS`.
        cache: folder of the CT token cache, or None for the default one.

    Raises:
        BundleError, PrototypeError, BackendError: they can't be used here.
    """

    def __init__(
        self, bundle: Bundle, *, backend: str = "onnxruntime", cache: Path | None = None
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.preprocess: Preprocess = bundle.preprocess
        self.prototypes = Prototypes.from_files(
            bundle.read(TENSORS), bundle.read(FACTS), encoder_sha256=bundle.encoder_sha256
        )
        self._cache = TokenCache(cache or cache_dir())
        self._sessions: dict[str, Session] = {}
        self._means: dict[str, Float] = {}
        self._classify = self._session("tile_classifier")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "onnxruntime",
        cache: Path | None = None,
    ) -> FewShotClassifier:
        """Open a bundle folder; see the class for the arguments and errors."""
        return cls(Bundle.open(path), backend=backend, cache=cache)

    @property
    def engine(self) -> str:
        """The engine and device that really run the graphs."""
        return self._classify.engine

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.prototypes.classes

    def predict(
        self, tiles: Sequence[TileLike], ct: CtLike | Context = None, **reading: Any
    ) -> list[Prediction]:
        """Classify tiles.

        Args:
            tiles: paths (a TIFF, PNG or JPEG file, or a folder of marker files), `Tile`s, or arrays
                `(H, W, M)` whose channels are in the bundle's order.
            ct: the patient's CT: a series folder, a `Volume`, a prepared context, or None.
            **reading: `channels`, `mpp` and `fill_missing`, as `read` takes them.

        Returns:
            One prediction a tile, in order.

        Raises:
            TileError, SeriesError: an input can't be used.
        """
        context = ct if isinstance(ct, Context) else self.context(ct)
        return list(self.predict_each((self.read(tile, **reading) for tile in tiles), context))

    def predict_each(self, tiles: Iterable[TileInput], context: Context) -> Iterator[Prediction]:
        """Classify tiles as they come, a batch an engine call, in bounded memory."""
        for batch in _batches(tiles, BATCH):
            started = perf_counter()
            outputs = self._classify.run(
                {
                    "tile": np.stack([tile.array for tile in batch]),
                    "ct_tokens": context.tokens,
                    "ct_present": context.present,
                    "prototypes": self.class_prototypes(context),
                    "scale": np.array([self.prototypes.scale], dtype=np.float32),
                }
            )
            share_ms = _ms_since(started) / len(batch)
            probabilities = softmax(outputs["logits"])
            for tile, chances, distances in zip(
                batch, probabilities, outputs["distances"], strict=True
            ):
                yield self._prediction(tile, chances, distances, context, share_ms)

    def embed(
        self, tiles: Sequence[TileLike], ct: CtLike | Context = None, **reading: Any
    ) -> Float:
        """Embed tiles in a CT context.

        Returns:
            `(B, E)` float32 unit vectors.
        """
        context = ct if isinstance(ct, Context) else self.context(ct)
        inputs = (self.read(tile, **reading) for tile in tiles)
        parts = [self._embed_tokens(self._tokens(b), context) for b in _batches(inputs, BATCH)]
        return np.concatenate(parts)

    def fit(
        self,
        tiles: Sequence[TileLike],
        labels: Sequence[str],
        ct: CtLike | Context = None,
        **reading: Any,
    ) -> None:
        """Replace the prototypes, in memory, by those of a support set.

        The scale stays as it was calibrated in training, so probabilities of a new support set are
        calibrated only as far as it resembles the old one.

        Args:
            tiles: the support tiles, as `predict` takes them.
            labels: the class name of each.
            ct: a CT context to prepare the prototypes for. Later predictions in another context
                embed the same support anew.
            **reading: as `predict` takes them.

        Raises:
            PrototypeError: numbers of tiles and labels differ, or there are fewer than two classes.
        """
        if len(tiles) != len(labels):
            raise PrototypeError(f"{len(tiles)} tiles and {len(labels)} labels: give one a tile")
        classes, indices = encode_labels(labels)
        inputs = [self.read(tile, **reading) for tile in tiles]
        blank = [tile.name for tile in inputs if tile.blank]
        if blank:
            raise PrototypeError(f"support tile {blank[0]} shows no tissue: leave it out")
        tokens = np.concatenate([self._tokens(batch) for batch in _batches(inputs, BATCH)])
        self.prototypes = replace(
            self.prototypes,
            classes=classes,
            labels=indices,
            tokens=tokens,
            support_sha256=tuple(tile.sha256 for tile in inputs),
        )
        self._means.clear()
        self.class_prototypes(ct if isinstance(ct, Context) else self.context(ct))

    def class_prototypes(self, context: Context) -> Float:
        """Return the prototypes `(K, E)` in a CT context; each context is computed once."""
        if context.key not in self._means:
            support = self.prototypes
            embedded = self._embed_tokens(support.tokens, context)
            self._means[context.key] = class_means(embedded, support.labels, len(support.classes))
        return self._means[context.key]

    def context(
        self, ct: CtLike, *, series_uid: str | None = None, allow_resample: bool = False
    ) -> Context:
        """Prepare a CT: read it, or find its tokens in the cache.

        Args:
            ct: a series folder, a `Volume`, or None for no CT.
            series_uid: which series of a folder that holds several.
            allow_resample: accept missing slices by resampling on true positions.

        Raises:
            SeriesError: the series can't be used.
        """
        if ct is None:
            shape = self._ct_tokens_shape()
            return Context(np.zeros(shape, np.float32), np.zeros(1, np.float32), "none", None, {})
        started = perf_counter()
        series = (
            ct
            if isinstance(ct, Volume)
            else scan_series(
                Path(ct),
                series_uid=series_uid,
                min_slices=self.preprocess.min_slices,
                allow_resample=allow_resample,
            )
        )
        key = self._token_key(series.series_hash)
        tokens = self._cache.get(key, self._ct_tokens_shape())
        hit = tokens is not None
        warnings = series.warnings
        timings: dict[str, float] = {}
        if tokens is None:
            volume = series if isinstance(series, Volume) else load_volume(series)
            warnings = volume.warnings
            ct_input = self.preprocess.ct(volume)
            timings["ct_read"] = _ms_since(started)
            started = perf_counter()
            tokens = self._session("ct_encoder").run({"ct": ct_input})["ct_tokens"]
            timings["ct_encode"] = _ms_since(started)
            self._cache.put(key, tokens)
        else:
            timings["ct_read"] = _ms_since(started)
        used = CtUsed(series.description, hit, warnings)
        return Context(tokens, np.ones(1, np.float32), key, used, timings)

    def read(
        self,
        tile: TileLike,
        *,
        channels: Sequence[str] | None = None,
        mpp: float | None = None,
        fill_missing: bool = False,
    ) -> TileInput:
        """Read one tile and bring it to the tile input.

        Args:
            tile: as `predict` takes it.
            channels: names for the channels of a file that has none.
            mpp: microns a pixel, where the file does not say or is wrong.
            fill_missing: fill a channel that the file lacks with zeros.

        Raises:
            TileError: the tile can't be used.
        """
        started = perf_counter()
        if fill_missing and not self.preprocess.fill_missing:
            raise TileError(
                "--fill-missing: this model was trained with every channel present: "
                "train with data.channel_dropout above 0, or give tiles with all channels"
            )
        if isinstance(tile, np.ndarray):
            found = self._from_array(tile)
        elif isinstance(tile, Tile):
            found = tile
        else:
            found = read_tile(tile, channels=channels, mpp=mpp)
        pixels, mapping, filled = match_channels(
            found, self.preprocess.channels, fill_missing=fill_missing
        )
        array = self.preprocess.tile(pixels, found.bits, name=found.source)
        notes = list(found.warnings)
        if filled:
            notes.append(f"channels filled with zeros: {', '.join(filled)}")
        if scale := self.preprocess.scale_warning(found):
            notes.append(scale)
        return TileInput(
            array,
            found.source,
            found.sha256,
            self.preprocess.is_blank(array),
            mapping,
            tuple(notes),
            _ms_since(started),
        )

    def _from_array(self, pixels: NDArray[Any]) -> Tile:
        expected = self.preprocess.channels
        if pixels.ndim != 3 or pixels.shape[2] != len(expected) or 0 in pixels.shape:
            raise TileError(
                f"array of shape {pixels.shape}: expected (H, W, {len(expected)}) with channels "
                f"{', '.join(expected)}"
            )
        bits = pixels.dtype.itemsize * 8
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
        return Tile(pixels, expected, bits, None, digest, "array")

    def _prediction(
        self,
        tile: TileInput,
        chances: NDArray[np.float64],
        distances: Float,
        context: Context,
        share_ms: float,
    ) -> Prediction:
        best = int(chances.argmax())
        reason = None
        if tile.blank:
            reason = "no tissue: every channel is almost flat"
        elif chances[best] < self.prototypes.min_confidence:
            reason = (
                f"low confidence: {chances[best]:.2f} for {self.classes[best]}, "
                f"at least {self.prototypes.min_confidence:.2f} is asked for"
            )
        timings = {**context.timings_ms, "tile_read": tile.read_ms, "classify": share_ms}
        return Prediction(
            tile=tile.name,
            label=None if reason else self.classes[best],
            probabilities=dict(zip(self.classes, map(float, chances), strict=True)),
            distances=dict(zip(self.classes, map(float, distances), strict=True)),
            abstained=reason is not None,
            reason=reason,
            ct=context.used,
            channels=tile.channels,
            warnings=tile.warnings,
            timings_ms={name: round(value, 3) for name, value in timings.items()},
        )

    def _tokens(self, batch: Sequence[TileInput]) -> Float:
        tiles = np.stack([tile.array for tile in batch])
        return self._session("path_encoder").run({"tile": tiles})["tile_tokens"]

    def _embed_tokens(self, tokens: Float, context: Context) -> Float:
        inputs = {
            "tile_tokens": tokens,
            "ct_tokens": context.tokens,
            "ct_present": context.present,
        }
        return self._session("bridge").run(inputs)["embedding"]

    def _session(self, graph: str) -> Session:
        if graph not in self._sessions:
            data = self.bundle.read(f"{graph}.onnx")
            self._sessions[graph] = open_session(self.backend, data)
        return self._sessions[graph]

    def _ct_tokens_shape(self) -> tuple[int, ...]:
        return tuple(self.bundle.manifest["graphs"]["ct_encoder"]["outputs"]["ct_tokens"]["shape"])

    def _token_key(self, series_hash: str) -> str:
        parts = [series_hash, self.bundle.ct_encoder_sha256, self.engine]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _batches(items: Iterable[TileInput], size: int) -> Iterator[list[TileInput]]:
    batch: list[TileInput] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1000.0
