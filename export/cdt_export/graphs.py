"""The modules as they are exported: tensors in, tensors out."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdt_export.inference import for_inference
from cdt_runtime.preprocess import Preprocess
from cdt_train.encoders.foundation_path import FoundationPath
from cdt_train.models.bridge import Bridge
from cdt_train.models.features import FeatureTokens
from cdt_train.models.prototypical import PrototypicalHead
from cdt_train.models.transfer_model import TransferModel


class BridgeGraph(nn.Module):
    """The bridge, with the residual before its gate as a second output.

    A nearly closed gate would hide a wrong residual from any comparison of embeddings.
    """

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(
        self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embed tiles in the context of one CT; see `Bridge.forward`."""
        residual = self.bridge.residual(tile_tokens, ct_tokens, ct_present)
        return self.bridge.combine(tile_tokens, residual, ct_present), residual


class WithFeatures(nn.Module):
    """An encoder with the tokens of foundation encoders behind its own.

    Args:
        encoder: images to tokens.
        features: brings what foundation encoders say to tokens.
    """

    def __init__(self, encoder: nn.Module, features: FeatureTokens) -> None:
        super().__init__()
        self.encoder, self.features = encoder, features

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Encode images; features are `(B, F)`, as `FeatureTokens.flat` lays them out."""
        tokens = self.encoder(images)
        return torch.cat([tokens, self.features(features).to(tokens.dtype)], dim=1)


class Decider(nn.Module):
    """Bridge and head: what stands behind the tile encoder."""

    def __init__(self, bridge: Bridge, head: PrototypicalHead) -> None:
        super().__init__()
        self.bridge = BridgeGraph(bridge)
        self.head = head

    def forward(
        self,
        tile_tokens: Tensor,
        ct_tokens: Tensor,
        ct_present: Tensor,
        prototypes: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify encoded tiles; inputs and outputs are those of the parts."""
        embedding, residual = self.bridge(tile_tokens, ct_tokens, ct_present)
        logits, distances = self.head(embedding, prototypes, scale)
        return logits, distances, embedding, residual


class TileClassifier(nn.Module):
    """Tile encoder, bridge and head in one graph: what the hot path runs."""

    def __init__(self, path_encoder: nn.Module, decider: Decider) -> None:
        super().__init__()
        self.path_encoder = path_encoder
        self.decider = decider

    def forward(
        self,
        tile: Tensor,
        ct_tokens: Tensor,
        ct_present: Tensor,
        prototypes: Tensor,
        scale: Tensor,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify tiles; inputs and outputs are those of the parts."""
        tokens = self.path_encoder(tile) if features is None else self.path_encoder(tile, features)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.decider(
            tokens, ct_tokens, ct_present, prototypes, scale
        )
        return found


class HalfPrecision(nn.Module):
    """A module computed in float16 behind float32 inputs and outputs.

    Layers that would lose decisions in half precision (normalisations, softmax, unit length) keep
    float32 inside; see `cdt_train.models.layers`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Cast in, compute, cast out."""
        outputs = self.module(*(x.half() if x.is_floating_point() else x for x in inputs))
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(output.float() for output in outputs)


EXACT = (BridgeGraph, PrototypicalHead)
"""Modules that stay in float32 whatever the precision of a bundle."""


def in_half_precision(module: nn.Module) -> nn.Module:
    """Return a copy that computes in float16, but for the bridge and the head.

    The head is tiny and decides; what the bridge adds is a small difference of large sums, which
    half precision would lose.
    """
    if isinstance(module, TileClassifier):
        return TileClassifier(in_half_precision(module.path_encoder), module.decider)
    if isinstance(module, EXACT):
        return module
    return HalfPrecision(copy.deepcopy(module))


@dataclass(frozen=True, eq=False)
class Graph:
    """One module with what the exporter and the parity check need to know of it.

    Attributes:
        name: of the ONNX file.
        module: in evaluation mode.
        inputs: example inputs by name.
        outputs: output names.
        dynamic: for each input the names of its dynamic axes, by axis.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]

    def precision_in(self, bundle: str) -> str:
        """The precision that it computes in, in a bundle of that precision."""
        return "fp32" if isinstance(self.module, EXACT) else bundle


def build_graphs(model: TransferModel, preprocess: Preprocess, *, n_classes: int) -> list[Graph]:
    """List the graphs of a bundle.

    The example batch and number of classes are larger than one, so that neither is taken for a
    constant.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tile = torch.randint(0, 256, (2, *preprocess.tile_shape), generator=generator).to(torch.uint8)
    if preprocess.tile_dtype == "float32":
        tile = tile.float() / 255.0
    ct = torch.rand(preprocess.ct_shape, generator=generator) * 2 - 1
    of_tile, of_ct = model.tile_features, model.ct_features
    said = {"features": torch.randn(2, of_tile.size, generator=generator)} if of_tile.count else {}
    heard = {"ct_features": torch.randn(1, of_ct.size, generator=generator)} if of_ct.count else {}
    own = model.path_encoder
    encoder = own.merged() if isinstance(own, FoundationPath) else for_inference(own)
    ct_encoder = for_inference(model.ct_encoder)
    if of_tile.count:
        encoder = WithFeatures(encoder, of_tile).eval()
    if of_ct.count:
        ct_encoder = WithFeatures(ct_encoder, of_ct).eval()
    with torch.no_grad():
        ct_tokens, ct_present = ct_encoder(ct, *heard.values()), model.head.log_scale.new_ones(1)
        tile_tokens = encoder(tile, *said.values())
        embedding = model.bridge(tile_tokens, ct_tokens, ct_present)
    prototypes = torch.nn.functional.normalize(
        torch.randn(max(2, n_classes), embedding.shape[1], generator=generator), dim=1
    )
    scale = model.head.scale.detach()
    bridge = BridgeGraph(model.bridge)
    batch, classes = {0: "batch"}, {0: "classes"}
    context = {"ct_tokens": ct_tokens, "ct_present": ct_present}
    head = {"prototypes": prototypes, "scale": scale}
    return [
        Graph("ct_encoder", ct_encoder, {"ct": ct, **heard}, ("ct_tokens",), {}),
        Graph(
            "path_encoder",
            encoder,
            {"tile": tile, **said},
            ("tile_tokens",),
            {"tile": batch, **({"features": batch} if said else {})},
        ),
        Graph(
            "bridge",
            bridge,
            {"tile_tokens": tile_tokens, **context},
            ("embedding", "ct_residual"),
            {"tile_tokens": batch},
        ),
        Graph(
            "head",
            model.head,
            {"embedding": embedding, **head},
            ("logits", "distances"),
            {"embedding": batch, "prototypes": classes},
        ),
        Graph(
            "tile_classifier",
            TileClassifier(encoder, Decider(model.bridge, model.head)),
            {"tile": tile, **context, **head, **said},
            ("logits", "distances", "embedding", "ct_residual"),
            {"tile": batch, "prototypes": classes, **({"features": batch} if said else {})},
        ),
    ]


def behind_encoder(classifier: Graph) -> Graph:
    """The tile classifier without its encoder: tile tokens in, in place of the tile."""
    module, inputs = classifier.module, dict(classifier.inputs)
    assert isinstance(module, TileClassifier)
    with torch.no_grad():
        tokens = module.path_encoder(inputs.pop("tile"))
    dynamic = {name: axes for name, axes in classifier.dynamic.items() if name != "tile"}
    return Graph(
        "decider",
        module.decider,
        {"tile_tokens": tokens, **inputs},
        classifier.outputs,
        {"tile_tokens": {0: "batch"}, **dynamic},
    )
