"""MedSigLIP-448: the image tower. Its text tower is in `medsiglip_text`.

Sources: the model card and repository of google/medsiglip-448; SigLIP, Zhai et al. 2023.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.encoder_card import EncoderCard, InputSpec
from cdt_train.encoders.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor, nn

LICENCE = "Health AI Developer Foundations terms of use"
LICENCE_URL = "https://developers.google.com/health-ai-developer-foundations/terms"
SQUEEZED = InputSpec(size=448, resize="bicubic")

CARD = EncoderCard(
    key="medsiglip",
    title="MedSigLIP-448, image tower",
    modality="tile",
    source="google/medsiglip-448",
    licence=LICENCE,
    licence_url=LICENCE_URL,
    gated=True,
    commercial=True,
    embedding_dim=1152,
    token_dim=1152,
    pooling="attention pooling over the 1024 patches",
    input=SQUEEZED,
    options={
        "bicubic": SQUEEZED,
        "tf_bilinear": InputSpec(size=448, resize="bilinear_plain"),
        "padded": InputSpec(size=448, resize="bicubic", pad=True),
    },
    packages=("transformers",),
    extra="haidef",
    verified="random",
)
TINY = replace(
    CARD,
    embedding_dim=32,
    token_dim=32,
    input=InputSpec(size=56),
    options={name: replace(spec, size=56) for name, spec in CARD.options.items()},
)


def vision_config(card: EncoderCard, *, head: bool = True) -> Any:
    """Return the configuration of the image tower that a card describes."""
    from transformers import SiglipVisionConfig

    tiny = card.embedding_dim == TINY.embedding_dim
    shape = {
        "hidden_size": card.embedding_dim,
        "intermediate_size": 64 if tiny else 4304,
        "num_hidden_layers": 2 if tiny else 27,
        "num_attention_heads": 4 if tiny else 16,
    }
    config = SiglipVisionConfig(
        **shape, image_size=card.input.size, patch_size=14, vision_use_head=head
    )
    config._attn_implementation = "sdpa"
    return config


def image_tower(card: EncoderCard) -> nn.Module:
    """Build the image tower; it gives `(embedding, tokens)`."""
    from torch import nn
    from transformers import SiglipVisionModel

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = SiglipVisionModel(vision_config(card))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            found = self.net(pixel_values=images)
            return found.pooler_output, found.last_hidden_state

    return Tower()


def load(path: Path, card: EncoderCard) -> nn.Module:
    """Load the image tower alone.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from cdt_train.encoders.tensors import behind, load_exactly, read_tensors

    tower: Any = image_tower(card)
    load_exactly(tower.net, read_tensors(path, behind("vision_model.")), path)
    found: nn.Module = tower
    return found


ENTRY = Entry(CARD, TINY, image_tower, load)
