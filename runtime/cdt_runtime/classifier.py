"""The few-shot classifier: a bundle, an engine and prototypes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.answer import Answer, Judge
from cdt_runtime.backends import Arrays, Precision, Session, open_session
from cdt_runtime.backends.session import run_batch
from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache, cache_dir
from cdt_runtime.conformal import Certificate, certify, own_chances
from cdt_runtime.ct_context import CtContexts
from cdt_runtime.doubt import Look, looks
from cdt_runtime.encoder_features import feature_layout, flat_features
from cdt_runtime.encoder_session import bundle_cards, bundle_encoders, encoder_marks
from cdt_runtime.errors import BackendError, InputError, PrototypeError, TileError
from cdt_runtime.prediction import Context, Prediction, TileInput
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.proof import Choice, choose_backend
from cdt_runtime.prototypes import (
    FACTS,
    TENSORS,
    Prototypes,
    encode_labels,
    fit_prototypes,
    softmax,
    transduced,
)
from cdt_runtime.reference import REFERENCE, Reference
from cdt_runtime.tile import Tile
from cdt_runtime.tile_input import TileLike, prepare
from cdt_runtime.volume import Volume

if TYPE_CHECKING:
    from cdt_runtime.tiff_meta import Z

Float = NDArray[np.float32]
CtLike = str | os.PathLike[str] | Volume | None


class FewShotClassifier:
    """Classifies tiles by their distance to class prototypes, with a CT as context.

    Args:
        bundle: an opened bundle.
        backend: name of the inference engine, a key of `BACKENDS`; `auto` takes the fastest on
            this machine of those that pass the bundle's self-test there.
        precision: `auto` is the engine's fastest that decides as before, `fp32` is none below that
            of the graphs.
        cache: folder of CT tokens and of proofs of engines, or None for the default one.
        tta: classify each tile in four orientations and take the mean.
        coverage: how often the set of classes that is given beside each answer is to hold the right
            one, above 0 and below 1; None for no sets. Certified without `tta` alone.

    Attributes:
        notes: why `auto` may not use an engine that is there, one line each.
        encoders: foundation encoders that the bundle holds.
        marks: what every answer has to say of these, one line each.
        contexts: makes what `context` gives.

    Raises:
        BundleError, PrototypeError, BackendError: they can't be used here.
    """

    batch_size = 32
    """Tiles in one engine call: beyond it a CPU gains nothing and memory grows."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        precision: Precision = "auto",
        cache: Path | None = None,
        tta: bool = False,
        coverage: float | None = None,
    ) -> None:
        if tta and coverage:
            raise InputError("sets are certified for tiles as they are: without test-time views")
        self.bundle, self.coverage, self.tta = bundle, coverage, tta
        folder = cache or cache_dir()
        choice = Choice(backend, precision)
        if backend == "auto":
            choice = choose_backend(bundle, precision, folder)
        self.backend, self.precision, self.notes = choice.backend, choice.precision, choice.notes
        self.preprocess: Preprocess = bundle.preprocess
        self.prototypes = Prototypes.from_files(
            bundle.read(TENSORS), bundle.read(FACTS), encoder_sha256=bundle.encoder_sha256
        )
        self.reference = Reference.from_bytes(bundle.read(REFERENCE), len(self.preprocess.channels))
        tokens = TokenCache(folder)
        self.encoders = bundle_encoders(bundle, self.backend, self.precision, tokens)
        self.marks = encoder_marks(bundle)
        self._layout = feature_layout(bundle_cards(bundle), "tile")
        self._sessions: dict[str, Session] = {}
        self._means: dict[str, Float] = {}
        self._certificates: dict[str, Certificate] = {}
        self._classify = self._session("tile_classifier")
        self.contexts = CtContexts(bundle, tokens, self.encoders, self.engine, self._encode_ct)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        precision: Precision = "auto",
        cache: Path | None = None,
        tta: bool = False,
        coverage: float | None = None,
        trust: Path | None = None,
    ) -> FewShotClassifier:
        """Open a bundle folder; see the class and `Bundle.open` for the arguments and errors."""
        return cls(
            Bundle.open(path, trust),
            backend=backend,
            precision=precision,
            cache=cache,
            tta=tta,
            coverage=coverage,
        )

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
            tiles: any number of tiles: paths (a TIFF, PNG or JPEG file, or a folder of marker
                files), `Tile`s, or arrays `(H, W, M)` whose channels are in the bundle's order.
            ct: the patient's CT: a series folder, a `Volume`, a prepared context, or None. Where
                `prototypes.ct_off` says so, the answer does not rest on it, and `ct_change` says
                what it would have changed.
            **reading: `channels`, `mpp`, `z` and `fill_missing`, as `read` takes them.

        Returns:
            One prediction a tile, in order.

        Raises:
            TileError, SeriesError: an input can't be used.
        """
        context = ct if isinstance(ct, Context) else self.context(ct)
        inputs = (self.read(tile, **reading) for tile in _several(tiles))
        return list(self.predict_each(inputs, context))

    def predict_each(self, tiles: Iterable[TileInput], context: Context) -> Iterator[Prediction]:
        """Classify tiles as they come, a batch an engine call, in bounded memory.

        Where the bundle does not rest on a CT, a second call tells what it would have changed.
        """
        off = self.prototypes.ct_off if context.used else None
        counted = self.context(None) if off else context
        judge = Judge(
            self.classes,
            self.prototypes.min_confidence,
            self.marks,
            self.certificate(counted) if self.coverage else None,
        )
        for batch in _batches(tiles, self.batch_size):
            said = self.hear(_images(batch), len(batch))
            seen = self.looks([tile.statistics for tile in batch])
            answers = self._answers(batch, counted, said, seen)
            beside = self._answers(batch, context, said, seen) if off else [None] * len(batch)
            for tile, answer, other in zip(batch, answers, beside, strict=True):
                yield judge.prediction(tile, answer, other, context, off)

    def embed(
        self, tiles: Sequence[TileLike], ct: CtLike | Context = None, **reading: Any
    ) -> Float:
        """Embed tiles in a CT context.

        Returns:
            `(B, E)` float32 unit vectors.
        """
        context = ct if isinstance(ct, Context) else self.context(ct)
        inputs = (self.read(tile, **reading) for tile in _several(tiles))
        batches = _batches(inputs, self.batch_size)
        parts = [self.embed_tokens(self._tokens(batch), context) for batch in batches]
        (width,) = self.bundle.output_shape("bridge", "embedding")
        return np.concatenate([np.zeros((0, width), np.float32), *parts])

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
        if len(_several(tiles)) != len(labels):
            raise PrototypeError(f"{len(tiles)} tiles and {len(labels)} labels: give one a tile")
        classes, indices = encode_labels(labels)
        inputs = [self.read(tile, **reading) for tile in tiles]
        blank = [tile.name for tile in inputs if tile.blank]
        if blank:
            raise PrototypeError(f"support tile {blank[0]} shows no tissue: leave it out")
        context = ct if isinstance(ct, Context) else self.context(ct)
        prototypes = replace(
            self.prototypes,
            classes=classes,
            labels=indices,
            tokens=self.encode(inputs),
            support_sha256=tuple(tile.sha256 for tile in inputs),
            ct_tokens=None,
            ct_of=None,
            statistics=np.stack([tile.statistics for tile in inputs]),
            statistics_of=np.arange(len(inputs), dtype=np.int64),
            held_out=(),
        )
        means = self._support_means(prototypes, context)
        # All that can fail has been done.
        self.prototypes, self._means, self._certificates = prototypes, {context.key: means}, {}

    def encode(self, inputs: Sequence[TileInput]) -> Float:
        """Return what the path encoder says of tiles, `(B, N, C)`: what a support set keeps."""
        return np.concatenate([self._tokens(batch) for batch in _batches(inputs, self.batch_size)])

    def embed_arrays(
        self, tiles: NDArray[Any], context: Context, features: Float | None = None
    ) -> Float:
        """Embed tile inputs `(B, M, S, S)`, as `classify` takes them; returns `(B, E)`."""
        said = self._run(self._session("path_encoder"), _named(tiles, features), {})
        return self.embed_tokens(said["tile_tokens"], context)

    def transduce(self, tiles: Sequence[TileInput], context: Context) -> int:
        """Draw the prototypes towards the tiles that are about to be classified, in memory.

        Tiles that show no tissue, are blurred or unlike what is known are left out.

        Args:
            tiles: that will be classified in this context.
            context: the CT's, or none.

        Returns:
            How many tiles were used.
        """
        counted = self.context(None) if self.prototypes.ct_off else context
        looks = self.looks([tile.statistics for tile in tiles])
        used = [
            tile for tile, look in zip(tiles, looks, strict=True) if not (tile.blank or look.word)
        ]
        if used:
            support = self.prototypes
            self._means[counted.key] = transduced(
                self.class_prototypes(counted),
                self.embed_support(support, counted),
                support.labels,
                self.embed_tokens(self.encode(used), counted),
                support.scale_with_ct if counted.used else support.scale,
            )
        return len(used)

    def embed_tokens(self, tokens: Float, context: Context) -> Float:
        """Embed what `encode` said of tiles in a CT context, `(B, E)` unit vectors."""
        inputs = {
            "tile_tokens": tokens,
            "ct_tokens": context.tokens,
            "ct_present": context.present,
        }
        return self._session("bridge").run(inputs)["embedding"]

    def class_prototypes(self, context: Context) -> Float:
        """Return the prototypes `(K, E)` in a CT context; each context is computed once."""
        if context.key not in self._means:
            self._means[context.key] = self._support_means(self.prototypes, context)
        return self._means[context.key]

    def certificate(self, context: Context) -> Certificate:
        """What makes a class part of the set of an answer in a CT context."""
        if context.key not in self._certificates:
            support = self.prototypes
            embedded = self.embed_support(support, context)
            self._certificates[context.key] = certify(
                own_chances(support, embedded, bool(context.used)), self.coverage or 0.0
            )
        return self._certificates[context.key]

    def _support_means(self, support: Prototypes, context: Context) -> Float:
        embedded = self.embed_support(support, context)
        return fit_prototypes(embedded, support.labels, len(support.classes), support.fit)

    def embed_support(self, support: Prototypes, context: Context) -> Float:
        """Embed the support: in the context, or with a CT each tile with its own patient's."""
        if context.used is None or support.ct_tokens is None or support.ct_of is None:
            return self.embed_tokens(support.tokens, context)
        embedded = np.empty((len(support.labels), support.tokens.shape[2]), np.float32)
        for index in np.unique(support.ct_of):
            mine, own = support.ct_of == index, self.context(None)
            if index >= 0:
                tokens = support.ct_tokens[index : index + 1]
                own = replace(own, tokens=tokens, present=np.ones(1, np.float32))
            embedded[mine] = self.embed_tokens(support.tokens[mine], own)
        return embedded

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
            return self.contexts.none()
        if isinstance(ct, Volume):
            return self.contexts.of_volume(ct)
        return self.contexts.of_folder(Path(ct), series_uid, allow_resample)

    def _finite(self, answer: Float) -> Float:
        if not np.isfinite(answer).all():
            raise BackendError(f"{self.engine}: an answer is not finite: use another --backend")
        return answer

    def read(
        self,
        tile: TileLike,
        *,
        channels: Sequence[str] | None = None,
        mpp: float | None = None,
        z: Z = None,
        fill_missing: bool = False,
    ) -> TileInput:
        """Read one tile and bring it to the tile input; see `tile_input.prepare`."""
        return prepare(
            tile,
            self.preprocess,
            channels=channels,
            mpp=mpp,
            z=z,
            fill_missing=fill_missing,
            encoders=self.encoders,
            adaptation=self.prototypes.adaptation,
        )

    def classify(
        self,
        tiles: NDArray[Any],
        context: Context,
        features: Float | None = None,
    ) -> tuple[NDArray[np.float64], Float]:
        """Classify tile inputs in one engine call.

        Args:
            tiles: `(B, M, S, S)`, as `preprocess` gives them.
            context: that `context` gave.
            features: `(B, F)`, what `hear` gave for these tiles; None where the model listens to no
                foundation encoder.

        Returns:
            Calibrated probabilities and distances, both `(B, K)`.

        Raises:
            BackendError: an answer is not finite.
        """
        support = self.prototypes
        scale = support.scale_with_ct if context.used else support.scale
        shared = {
            "ct_tokens": context.tokens,
            "ct_present": context.present,
            "prototypes": self.class_prototypes(context),
            "scale": np.array([scale], dtype=np.float32),
        }
        views = orientations(tiles) if self.tta else [tiles]
        said = [self._run(self._classify, _named(view, features), shared) for view in views]
        logits, distances = (
            said[0][name] if len(said) == 1 else np.mean([one[name] for one in said], axis=0)
            for name in ("logits", "distances")
        )
        return softmax(self._finite(logits)), distances

    def hear(self, images: Mapping[str, Float], count: int) -> Float | None:
        """Ask the foundation encoders.

        Args:
            images: tiles as each takes them, by encoder `(B, ...)`, as `encoders.images` makes one.
            count: B.

        Returns:
            `(B, F)`, zeros where one is not in the bundle; None where the model listens to none.
        """
        if not self._layout:
            return None
        return flat_features(self._layout, self.encoders.of_images(images), count)

    def looks(self, statistics: Sequence[Float]) -> list[Look]:
        """Hold tiles against those that are known, by their `tile_statistics` `(F,)`."""
        channels = len(self.preprocess.channels)
        return looks(self.reference, self.prototypes, statistics, channels)

    def _answers(
        self,
        batch: Sequence[TileInput],
        context: Context,
        features: Float | None,
        seen: Sequence[Look],
    ) -> list[Answer]:
        """Classify a batch in one context."""
        started = perf_counter()
        answers = self.classify(_arrays(batch), context, features)
        share_ms = _ms_since(started) / len(batch)
        return [
            Answer(
                dict(zip(self.classes, map(float, chances), strict=True)),
                dict(zip(self.classes, map(float, distances), strict=True)),
                share_ms,
                look,
            )
            for chances, distances, look in zip(*answers, seen, strict=True)
        ]

    def _tokens(self, batch: Sequence[TileInput]) -> Float:
        inputs = _named(_arrays(batch), self.hear(_images(batch), len(batch)))
        return self._run(self._session("path_encoder"), inputs, {})["tile_tokens"]

    def _run(self, session: Session, batch: Arrays, shared: Arrays) -> dict[str, NDArray[Any]]:
        """Run a batch; where the engine has no memory for it, in smaller ones from now on."""
        found, size = run_batch(session, batch, shared)
        if size is not None:
            self.batch_size = min(self.batch_size, size)
        return found

    def _encode_ct(self, inputs: dict[str, Float]) -> Float:
        return self._finite(self._session("ct_encoder").run(inputs)["ct_tokens"])

    def _session(self, graph: str) -> Session:
        if graph not in self._sessions:
            data = self.bundle.read(f"{graph}.onnx")
            self._sessions[graph] = open_session(self.backend, data, self.precision)
        return self._sessions[graph]


def _several(tiles: Sequence[TileLike]) -> Sequence[TileLike]:
    """Refuse one tile in place of several: a path would be taken apart into letters.

    Raises:
        TileError: it is a single path or array.
    """
    if isinstance(tiles, str | os.PathLike | Tile | np.ndarray):
        raise TileError("one tile where several are expected: put it in a list")
    return tiles


def orientations(tiles: NDArray[Any]) -> list[NDArray[Any]]:
    """Tiles `(B, M, S, S)` as they are, and turned by 90, 180 and 270 degrees."""
    return [np.ascontiguousarray(np.rot90(tiles, turns, axes=(2, 3))) for turns in range(4)]


def _named(tiles: NDArray[Any], features: Float | None) -> dict[str, NDArray[Any]]:
    return {"tile": tiles} if features is None else {"tile": tiles, "features": features}


def _arrays(batch: Sequence[TileInput]) -> NDArray[Any]:
    return np.stack([tile.array for tile in batch])


def _images(batch: Sequence[TileInput]) -> dict[str, Float]:
    return {key: np.stack([tile.images[key] for tile in batch]) for key in batch[0].images}


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
