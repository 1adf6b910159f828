"""The same evaluation from what is deployed: embeddings by an exported bundle's own graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cdt_runtime.backends import Session, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.encoder_features import Layout, feature_layout, flat_features
from cdt_runtime.encoder_session import bundle_cards
from cdt_runtime.errors import BundleError
from cdt_train.models.prototypical import PrototypicalHead
from cdt_train.models.transfer_model import TransferModel
from cdt_train.scores import Floats

PARTS = ("ct_encoder", "path_encoder", "bridge")


def embed_with_bundle(
    bundle_dir: str | os.PathLike[str],
    tiles: NDArray[Any],
    ct: Floats | None,
    *,
    backend: str = "onnxruntime",
) -> Floats:
    """Embed preprocessed tiles as the deployed classifier embeds them, in batches of its size.

    `score_episodes` of these gives the table of what is shipped, on the same episodes.

    Args:
        bundle_dir: folder of the bundle.
        tiles: `(n, M, S, S)`, of the type and size that the bundle's preprocessing gives.
        ct: `(1, W, D, S, S)` or None.
        backend: key of `cdt_runtime.backends.BACKENDS`.

    Returns:
        `(n, E)` float32 unit vectors.

    Raises:
        BundleError: the folder is no bundle, or takes other tiles or another CT.
        BackendError: the engine can't run here.
    """
    bundle = Bundle.open(bundle_dir)
    _require_inputs(bundle, tiles, ct)
    sessions = {name: open_session(backend, bundle.read(f"{name}.onnx")) for name in PARTS}
    context = _context(bundle, sessions["ct_encoder"], ct)
    size = FewShotClassifier.batch_size
    parts = [
        _embed(sessions, tiles[start : start + size], context)
        for start in range(0, len(tiles), size)
    ]
    return np.concatenate(parts)


def shipped_model(bundle: Bundle, *, backend: str = "onnxruntime") -> TransferModel:
    """Put the graphs of a bundle behind the parts of a model, for the evaluation of both alike.

    It embeds; it has neither head nor context bank, and learns nothing.
    """
    sessions = {name: open_session(backend, bundle.read(f"{name}.onnx")) for name in PARTS}
    outputs = bundle.manifest["graphs"]["ct_encoder"]["outputs"]
    parts: Any = (
        _Encoder(sessions["ct_encoder"], "ct", "ct_tokens"),
        _Encoder(sessions["path_encoder"], "tile", "tile_tokens"),
        _Bridge(sessions["bridge"], tuple(outputs["ct_tokens"]["shape"])),
        nn.Identity(),
        nn.Identity(),
    )
    ct_encoder, path_encoder, bridge, discriminator, classifier = parts
    encoders = bundle_cards(bundle)
    return _Shipped(
        (feature_layout(encoders, "tile"), feature_layout(encoders, "ct")),
        *(ct_encoder, path_encoder, bridge, PrototypicalHead(), discriminator, classifier),
    )


class _Shipped(TransferModel):
    """Its graphs take the features of foundation encoders and give their tokens, too."""

    def __init__(self, layouts: tuple[Layout, Layout], *parts: Any) -> None:
        super().__init__(*parts)
        self._of_tile, self._of_ct = layouts

    def tile_tokens(self, tiles: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Encode tiles by the graph."""
        found: Tensor = self.path_encoder(tiles, *self._flat(self._of_tile, features, len(tiles)))
        return found

    def ct_tokens(self, ct: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Encode volumes by the graph."""
        found: Tensor = self.ct_encoder(ct, *self._flat(self._of_ct, features, len(ct)))
        return found

    @staticmethod
    def _flat(layout: Layout, features: Mapping[str, Tensor], count: int) -> list[Tensor]:
        arrays = {key: values.numpy() for key, values in features.items()}
        return [torch.from_numpy(flat_features(layout, arrays, count))] if layout else []


class _Encoder(nn.Module):
    def __init__(self, session: Session, source: str, target: str) -> None:
        super().__init__()
        self.session, self.source, self.target = session, source, target
        self.told = "features" if source == "tile" else "ct_features"

    def forward(self, images: Tensor, *features: Tensor) -> Tensor:
        inputs = {self.source: np.ascontiguousarray(images.numpy())}
        for part in features:
            inputs[self.told] = part.numpy()
        return torch.from_numpy(self.session.run(inputs)[self.target])


class _Bridge(nn.Module):
    """Runs tiles in the context of one CT, or each in its own.

    Attributes:
        bank: zeros in the shape of the CT tokens, which stand in for no CT.
    """

    bank: Tensor

    def __init__(self, session: Session, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.session = session
        self.register_buffer("bank", torch.zeros(shape))

    def bank_context(self) -> Tensor:
        return self.bank

    def forward(self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor) -> Tensor:
        if len(ct_tokens) == 1:
            return self._in_one(tile_tokens, ct_tokens, ct_present)
        alike: dict[bytes, list[int]] = {}
        for index, ct in enumerate(ct_tokens):
            alike.setdefault(ct.numpy().tobytes(), []).append(index)
        embedded = torch.empty(len(tile_tokens), ct_tokens.shape[-1])
        for chosen in alike.values():
            one = slice(chosen[0], chosen[0] + 1)
            embedded[chosen] = self._in_one(tile_tokens[chosen], ct_tokens[one], ct_present[one])
        return embedded

    def _in_one(self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor) -> Tensor:
        named = {"tile_tokens": tile_tokens, "ct_tokens": ct_tokens, "ct_present": ct_present}
        inputs = {name: np.ascontiguousarray(value.numpy()) for name, value in named.items()}
        return torch.from_numpy(self.session.run(inputs)["embedding"])


def _embed(
    sessions: Mapping[str, Session], tiles: NDArray[Any], context: Mapping[str, Floats]
) -> Floats:
    tokens = sessions["path_encoder"].run({"tile": np.ascontiguousarray(tiles)})
    embedded: Floats = sessions["bridge"].run({**tokens, **context})["embedding"]
    return embedded


def _context(bundle: Bundle, encoder: Session, ct: Floats | None) -> dict[str, Floats]:
    if ct is None:
        shape = bundle.manifest["graphs"]["ct_encoder"]["outputs"]["ct_tokens"]["shape"]
        return {"ct_tokens": np.zeros(shape, np.float32), "ct_present": np.zeros(1, np.float32)}
    return {**encoder.run({"ct": ct}), "ct_present": np.ones(1, np.float32)}


def _require_inputs(bundle: Bundle, tiles: NDArray[Any], ct: Floats | None) -> None:
    """Refuse what the graphs would refuse, in words.

    Raises:
        BundleError: naming the shapes.
    """
    preprocess = bundle.preprocess
    if len(tiles) == 0:
        raise BundleError(f"{bundle.path.name}: no tile to embed: give at least one")
    if tiles.shape[1:] != preprocess.tile_shape or tiles.dtype != preprocess.tile_dtype:
        raise BundleError(
            f"{bundle.path.name}: takes tiles of {preprocess.tile_shape} {preprocess.tile_dtype}, "
            f"found {tiles.shape[1:]} {tiles.dtype}: preprocess them as the bundle does"
        )
    if ct is not None and ct.shape != preprocess.ct_shape:
        raise BundleError(
            f"{bundle.path.name}: takes a CT of {preprocess.ct_shape}, found {ct.shape}: "
            f"preprocess it as the bundle does"
        )
