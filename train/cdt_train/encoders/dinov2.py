"""Pathology encoders that are DINOv2 transformers as the library `transformers` has them.

Sources: model cards of owkin/phikon-v2 and kaiko-ai/midnight.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.encoder_card import EncoderCard, InputSpec
from cdt_train.encoders.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHAPES: dict[int, dict[str, Any]] = {
    1024: {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16, "image_size": 224},
    1536: {
        **{"num_hidden_layers": 40, "num_attention_heads": 24, "patch_size": 14},
        **{"image_size": 224, "use_swiglu_ffn": True},
    },
    32: {
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 56},
        "layerscale_value": 1.0,
    },
}
"""By width. The tiny one has layer scales of 1: at 1e-5 a random net says the same of all."""

PHIKON = EncoderCard(
    key="phikon-v2",
    title="Phikon-v2",
    modality="tile",
    source="owkin/phikon-v2",
    licence="Owkin non-commercial",
    licence_url="https://huggingface.co/owkin/phikon-v2",
    commercial=False,
    embedding_dim=1024,
    token_dim=1024,
    pooling="class token",
    input=InputSpec(size=224, resize="bicubic", mean=IMAGENET[0], std=IMAGENET[1], mpp=(0.5,)),
    packages=("transformers",),
    extra="haidef",
    verified="random",
)
MIDNIGHT = replace(
    PHIKON,
    key="midnight",
    title="Midnight-12k",
    source="kaiko-ai/midnight",
    licence="MIT",
    licence_url="https://huggingface.co/kaiko-ai/midnight",
    commercial=True,
    embedding_dim=1536,
    token_dim=1536,
    input=InputSpec(size=224, resize="bicubic", mpp=(2.0, 1.0, 0.5, 0.25)),
)


def transformer(card: EncoderCard) -> nn.Module:
    """Build the transformer; it gives the class token and the patches."""
    from torch import nn
    from transformers import Dinov2Config, Dinov2Model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = Dinov2Config(hidden_size=card.embedding_dim, **SHAPES[card.embedding_dim])
            self.inner: Any = Dinov2Model(config)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.inner(pixel_values=images).last_hidden_state
            return hidden[:, 0], hidden[:, 1:]

    return Net()


def load(path: Path, card: EncoderCard) -> nn.Module:
    """Load the transformer.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from cdt_train.encoders.tensors import behind, load_exactly, read_tensors

    net: Any = transformer(card)
    wanted = behind("embeddings.", "encoder.", "layernorm.")
    load_exactly(net.inner, read_tensors(path, wanted), path)
    found: nn.Module = net
    return found


def _entry(card: EncoderCard) -> Entry:
    small = replace(card, embedding_dim=32, token_dim=32, input=replace(card.input, size=56))
    return Entry(card, small, transformer, load)


ENTRIES = (_entry(PHIKON), _entry(MIDNIGHT))
