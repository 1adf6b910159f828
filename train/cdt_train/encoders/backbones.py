"""Backbones by name behind one face: images in, tokens out.

    conv2d, conv3d       the house's tile and CT encoders
    shape3d              the house's encoder of isotropic volumes
    timm:NAME            any model of timm that gives features, for tiles
    monai:NAME           a residual net of MONAI, such as monai:resnet18, for volumes
    transformers:FOLDER  a vision model saved by transformers, with its weights

Nothing is ever downloaded: pretrained weights come from a file or folder that is named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdt_runtime.errors import MissingDependencyError, RecipeError
from cdt_train.encoders.conv2d import PathEncoder
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.encoders.res3d import ShapeEncoder

FEATURE_DIM = 128


class Backbone(nn.Module):
    """A network that gives tokens, and the standardisation it expects.

    Args:
        net: images to tokens `(B, N, C)`.
        width: C.
        mean: subtracted from each channel of images in 0 to 1; one figure for all, or one each.
        std: divides what is left.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        width: int,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.net, self.width = net, width
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: `(B, C, H, W)` or `(B, C, D, H, W)` float, 0 to 1.

        Returns:
            `(B, N, C)`.
        """
        shape = (1, -1, *(1,) * (images.ndim - 2))
        found: Tensor = self.net((images - self.mean.view(shape)) / self.std.view(shape))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, as `tokens`."""
        return self.tokens(images)


@dataclass(frozen=True)
class ImageShape:
    """What a backbone takes in.

    Attributes:
        channels: of an image.
        sides: `(H, W)` or `(D, H, W)`.
    """

    channels: int
    sides: tuple[int, ...]


def build_backbone(name: str, shape: ImageShape, *, seed: int) -> Backbone:
    """Build a backbone with seeded weights; `transformers:` brings its own.

    Args:
        name: see the module's docstring.
        shape: of the images that it will see.
        seed: of the weights.

    Raises:
        RecipeError: no such backbone, or it does not take images of that shape.
        MissingDependencyError: the library that brings it is not installed.
        CheckpointError: the folder of a `transformers:` model can't be used.
    """
    kind, _, rest = name.partition(":")
    if kind not in BACKBONES or bool(rest) != (kind in LIBRARIES):
        known = ", ".join([*(set(BACKBONES) - LIBRARIES), *(f"{kind}:NAME" for kind in LIBRARIES)])
        raise RecipeError(f"backbone {name!r}: unknown; the backbones are {known}")
    axes, build = BACKBONES[kind]
    if len(shape.sides) not in axes:
        raise RecipeError(
            f"backbone {name}: takes {axes[0]}D images, and the data are {len(shape.sides)}D: "
            f"{'conv2d or timm:NAME' if len(shape.sides) == 2 else 'shape3d or conv3d'} fits"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(rest, shape)


def count_tokens(backbone: Backbone, shape: ImageShape) -> int:
    """Return how many tokens the backbone makes of one image.

    Raises:
        RecipeError: the images are too small, or otherwise of a shape that it can't take.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            return backbone.tokens(torch.zeros(1, shape.channels, *shape.sides)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        sides = " x ".join(map(str, shape.sides))
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"the backbone can't take images of {shape.channels} x {sides}: {first}: "
            f"give another --image-size or --backbone"
        ) from error
    finally:
        backbone.train(was_training)


def _conv2d(_: str, shape: ImageShape) -> Backbone:
    net = PathEncoder(shape.channels, (16, 32, 64, 128), FEATURE_DIM)
    return Backbone(net, FEATURE_DIM, mean=(0.5,), std=(0.25,))


def _conv3d(_: str, shape: ImageShape) -> Backbone:
    net = CtEncoder(shape.channels, (16, 32, 64, 128), FEATURE_DIM)
    return Backbone(net, FEATURE_DIM, mean=(0.5,), std=(0.5,))


def _shape3d(_: str, shape: ImageShape) -> Backbone:
    net = ShapeEncoder(shape.channels, (16, 32, 64), FEATURE_DIM)
    return Backbone(net, FEATURE_DIM)


def _timm(name: str, shape: ImageShape) -> Backbone:
    timm = _library("timm")
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": shape.channels}
    try:
        net = timm.create_model(name, **options)
    except RuntimeError as error:
        raise RecipeError(f"backbone timm:{name}: timm knows no such model") from error
    if hasattr(net, "patch_embed"):  # its positions are counted for one size
        net = timm.create_model(name, **options, img_size=shape.sides)
    mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    if len(mean) != shape.channels:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Backbone(_TimmTokens(net), net.num_features, mean=mean, std=std)


class _TimmTokens(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return _as_tokens(self.net.forward_features(images), self.net.num_features)


def _as_tokens(features: Tensor, width: int) -> Tensor:
    """Bring a feature map, channels first or last, or tokens, to `(B, N, C)`."""
    if features.ndim > 3 and features.shape[1] == width:
        return features.flatten(2).transpose(1, 2)
    return features.reshape(len(features), -1, width)


def _monai(name: str, shape: ImageShape) -> Backbone:
    nets = _library("monai.networks.nets")
    build = getattr(nets, name, None)
    if build is None or not name.startswith("resnet"):
        raise RecipeError(f"backbone monai:{name}: not a residual net of MONAI, such as resnet18")
    net = build(spatial_dims=len(shape.sides), n_input_channels=shape.channels, num_classes=1)
    width = net.fc.in_features
    net.fc = nn.Identity()
    return Backbone(_MonaiTokens(net), width)


class _MonaiTokens(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        net = self.net
        features = net.act(net.bn1(net.conv1(images)))
        if not net.no_max_pool:
            features = net.maxpool(features)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            features = stage(features)
        tokens: Tensor = features.flatten(2).transpose(1, 2)
        return tokens


def _transformers(folder: str, shape: ImageShape) -> Backbone:
    from cdt_train.encoders.weights import load_transformers

    net, mean, std = load_transformers(_library("transformers"), Path(folder), shape.channels)
    return Backbone(_TransformersTokens(net), net.config.hidden_size, mean=mean, std=std)


class _TransformersTokens(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.net(pixel_values=images).last_hidden_state
        return _as_tokens(hidden, self.net.config.hidden_size)


def _library(module: str) -> Any:
    """Import a library that is not always there.

    Raises:
        MissingDependencyError: it is not installed, or not as it should be.
    """
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == name:
            reason = "is not installed"
        else:  # what it needs in turn is missing, or of another version
            reason = f"can't be imported ({str(error).splitlines()[0]})"
        raise MissingDependencyError(
            f"backbone {name}: {name} {reason}: pip install {name}"
        ) from error


Builder = Callable[[str, ImageShape], Backbone]

BACKBONES: dict[str, tuple[tuple[int, ...], Builder]] = {
    "conv2d": ((2,), _conv2d),
    "conv3d": ((3,), _conv3d),
    "shape3d": ((3,), _shape3d),
    "timm": ((2,), _timm),
    "monai": ((3, 2), _monai),
    "transformers": ((2,), _transformers),
}

LIBRARIES = {"timm", "monai", "transformers"}
