"""Pathology encoders that are vision transformers of timm, and any other model of timm.

Their weights are files of a hub repository. Sources: the model cards that `licence_url` leads to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.encoder_card import EncoderCard, InputSpec
from cdt_runtime.errors import CheckpointError, RecipeError
from cdt_train.encoders.dinov2 import IMAGENET
from cdt_train.encoders.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor, nn

OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
PREFIX = "timm:"
FILES = ("*.safetensors", "*.bin", "*.pth")


@dataclass(frozen=True)
class Recipe:
    """How timm makes it.

    Attributes:
        name: of timm's model.
        options: of `timm.create_model`.
        swiglu: whether its layers are gated, which timm takes as a class.
        mean_of_patches: whether the embedding is the class token and the mean of the patches.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    swiglu: bool = False
    mean_of_patches: bool = False


RECIPES = {
    "uni": Recipe(
        "vit_large_patch16_224", {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True}
    ),
    "uni2-h": Recipe(
        "vit_giant_patch14_224",
        {
            **{"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536},
            **{"init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "no_embed_class": True},
            **{"reg_tokens": 8, "dynamic_img_size": True},
        },
        swiglu=True,
    ),
    "virchow2": Recipe(
        "vit_huge_patch14_224",
        {
            **{"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4},
            **{"global_pool": "", "dynamic_img_size": True},
        },
        swiglu=True,
        mean_of_patches=True,
    ),
    "h-optimus-0": Recipe(
        "vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5, "global_pool": ""}
    ),
    "h-optimus-1": Recipe(
        "vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5, "global_pool": ""}
    ),
    "prov-gigapath": Recipe(
        "vit_giant_patch14_dinov2",
        {
            **{"img_size": 224, "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24},
            **{"init_values": 1e-5, "mlp_ratio": 5.33334},
        },
    ),
    "gpfm": Recipe("vit_large_patch14_dinov2", {"img_size": 224, "init_values": 1e-5}),
}
TINY: dict[str, Any] = {
    **{"depth": 2, "num_heads": 4, "embed_dim": 128, "mlp_ratio": 4.0},
    **{"init_values": 1.0, "img_size": 64, "patch_size": 16},
}
"""What the tiny ones change. Layer scales are 1: at 1e-5 a random net says the same of all. Narrow
nets lose more to 4 bits than the encoders that they stand for."""


def _card(key: str, title: str, source: str, licence: str, width: int, **facts: Any) -> EncoderCard:
    spec = InputSpec(size=224, resize="bicubic", mean=IMAGENET[0], std=IMAGENET[1], mpp=(0.5,))
    return EncoderCard(
        key=key,
        title=title,
        modality="tile",
        source=source,
        licence=licence,
        licence_url=f"https://huggingface.co/{source}",
        embedding_dim=width * (2 if RECIPES[key].mean_of_patches else 1),
        token_dim=width,
        pooling="class token and mean of the patches"
        if RECIPES[key].mean_of_patches
        else "class token",
        input=facts.pop("input", spec),
        packages=("timm",),
        verified="random",
        **facts,
    )


_OWN = InputSpec(size=224, resize="bicubic", mean=OPTIMUS[0], std=OPTIMUS[1], mpp=(0.5,))
_CUT = InputSpec(
    size=224, resize="bicubic", resize_to=256, mean=IMAGENET[0], std=IMAGENET[1], mpp=(0.5,)
)
CARDS = (
    _card("uni", "UNI", "MahmoodLab/UNI", "CC BY-NC-ND 4.0", 1024, gated=True),
    _card("uni2-h", "UNI2-h", "MahmoodLab/UNI2-h", "CC BY-NC-ND 4.0", 1536, gated=True),
    _card("virchow2", "Virchow2", "paige-ai/Virchow2", "CC BY-NC-ND 4.0", 1280, gated=True),
    _card(
        "h-optimus-0",
        "H-optimus-0",
        "bioptimus/H-optimus-0",
        "Apache 2.0",
        1536,
        commercial=True,
        input=_OWN,
    ),
    _card(
        "h-optimus-1",
        "H-optimus-1",
        "bioptimus/H-optimus-1",
        "CC BY-NC-ND 4.0",
        1536,
        gated=True,
        input=_OWN,
    ),
    _card(
        "prov-gigapath",
        "Prov-GigaPath, tile encoder",
        "prov-gigapath/prov-gigapath",
        "Prov-GigaPath licence",
        1536,
        gated=True,
        input=_CUT,
    ),
    _card("gpfm", "GPFM", "majiabo/GPFM", "CC BY-NC-SA 4.0", 1024, gated=True),
)


def transformer(card: EncoderCard) -> nn.Module:
    """Build the transformer; it gives the embedding and the patches."""
    import timm
    from torch import nn

    recipe = RECIPES[card.key]
    options = {**recipe.options, "num_classes": 0}
    if card.input.size != 224:
        options |= TINY
    if recipe.swiglu:
        options |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    return _tokens(
        timm.create_model(recipe.name, pretrained=False, **options), recipe.mean_of_patches
    )


def load(path: Path, card: EncoderCard) -> nn.Module:
    """Load the transformer.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from cdt_train.encoders.tensors import load_exactly
    from cdt_train.encoders.weights import read_weights

    net: Any = transformer(card)
    load_exactly(net.inner, _bare(read_weights(weights_file(path))), path)
    found: nn.Module = net
    return found


def any_model(key: str) -> Entry:
    """Describe any model of timm that gives features, `timm:NAME`; weights by path alone.

    Raises:
        RecipeError: timm knows no such model, or is not installed.
    """
    import importlib

    try:
        timm: Any = importlib.import_module("timm")
        settings = timm.get_pretrained_cfg(key.removeprefix(PREFIX))
        net = timm.create_model(key.removeprefix(PREFIX), pretrained=False, num_classes=0)
    except ImportError as error:
        raise RecipeError(f"encoder {key}: timm is not installed: pip install timm") from error
    except RuntimeError as error:
        raise RecipeError(f"encoder {key}: timm knows no such model") from error
    size = settings.input_size[1] if settings else 224
    mean, std = (settings.mean, settings.std) if settings else IMAGENET
    card = EncoderCard(
        key=key,
        title=key.removeprefix(PREFIX),
        modality="tile",
        source=f"timm, {key.removeprefix(PREFIX)}",
        licence="that of the weights",
        licence_url="https://github.com/huggingface/pytorch-image-models",
        embedding_dim=net.num_features,
        pooling="as timm pools it",
        input=InputSpec(size=size, resize="bicubic", mean=tuple(mean), std=tuple(std)),
        packages=("timm",),
    )

    def build(_: EncoderCard) -> nn.Module:
        made = timm.create_model(card.title, pretrained=False, num_classes=0)
        return _pooled(made)

    def loaded(path: Path, _: EncoderCard) -> nn.Module:
        from cdt_train.encoders.tensors import load_exactly
        from cdt_train.encoders.weights import read_weights

        made: Any = build(card)
        load_exactly(made.inner, _bare(read_weights(weights_file(path))), path)
        found: nn.Module = made
        return found

    return Entry(card, card, build, loaded, FILES)


def _tokens(net: Any, mean_of_patches: bool) -> nn.Module:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.inner.forward_features(images)
            first, patches = hidden[:, 0], hidden[:, self.inner.num_prefix_tokens :]
            if mean_of_patches:
                first = torch.cat([first, patches.mean(dim=1)], dim=1)
            return first, patches

    return Net()


def _pooled(net: Any) -> nn.Module:
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.inner(images),)

    return Net()


def weights_file(path: Path) -> Path:
    """Find the weights in a folder.

    Raises:
        CheckpointError: there are none.
    """
    if path.is_file():
        return path
    found = [file for end in FILES for file in sorted(path.glob(end))]
    if not found:
        raise CheckpointError(f"{path}: no *.safetensors, *.bin or *.pth in it")
    return found[0]


def _bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix of those that hold the transformer as a part of a model."""
    for prefix in ("backbone.", "model.", "module."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _entry(card: EncoderCard) -> Entry:
    width, side = TINY["embed_dim"], TINY["img_size"]
    wide = 2 * width if RECIPES[card.key].mean_of_patches else width
    spec = replace(card.input, size=side, resize_to=72 if card.input.resize_to else None)
    small = replace(card, embedding_dim=wide, token_dim=width, input=spec)
    return Entry(card, small, transformer, load, FILES)


ENTRIES = tuple(_entry(card) for card in CARDS)
