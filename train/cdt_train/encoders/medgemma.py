"""MedGemma 1.5 4B: its image tower and projector look at the slices of a CT.

The language model is not loaded for that: tower and projector are a tenth of the weights. Whole and
in 4 bits it is in `medgemma_text`.

Sources: the model card of google/medgemma-1.5-4b-it and its notebooks on CT.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdt_runtime.encoder_card import EncoderCard, InputSpec, VolumeSpec
from cdt_train.encoders.entry import Entry
from cdt_train.encoders.medsiglip import LICENCE, LICENCE_URL, vision_config

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOWS = VolumeSpec(
    windows=((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0)),  # everything, soft tissue, brain
    max_slices=85,
)
CARD = EncoderCard(
    key="medgemma",
    title="MedGemma 1.5 4B, image tower and projector",
    modality="ct",
    source="google/medgemma-1.5-4b-it",
    licence=LICENCE,
    licence_url=LICENCE_URL,
    gated=True,
    commercial=True,
    embedding_dim=1152,
    token_dim=2560,
    pooling="mean over the tower's 4096 patches; tokens are the 256 that the language model gets",
    input=InputSpec(size=896, resize="bilinear", volume=WINDOWS),
    packages=("transformers",),
    extra="haidef",
    verified="random",
)
TINY = replace(
    CARD,
    embedding_dim=32,
    token_dim=48,
    input=InputSpec(size=56, resize="bilinear", volume=replace(WINDOWS, max_slices=6)),
)


def tower(card: EncoderCard) -> nn.Module:
    """Build image tower and projector; they give `(embedding, tokens)` of each slice.

    The projector's weight is zero as the library makes it, and tokens would be all alike: here it
    is drawn.
    """
    from torch import nn
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionModel
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    tiny = card.embedding_dim == TINY.embedding_dim
    seen = vision_config(card, head=False)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(hidden_size=card.token_dim or 0).to_dict(),
        vision_config=seen.to_dict(),
        mm_tokens_per_image=4 if tiny else 256,
    )

    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = SiglipVisionModel(seen)
            self.multi_modal_projector = Gemma3MultiModalProjector(config)
            weight = self.multi_modal_projector.mm_input_projection_weight
            nn.init.normal_(weight, std=card.embedding_dim**-0.5)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            patches = self.vision_tower(pixel_values=images).last_hidden_state
            return patches.mean(dim=1), self.multi_modal_projector(patches)

    return Slices()


def load(path: Path, card: EncoderCard) -> nn.Module:
    """Load tower and projector alone.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from cdt_train.encoders.tensors import behind, load_exactly, read_tensors

    net = tower(card)
    wanted = behind("vision_tower.", "multi_modal_projector.")
    load_exactly(net, read_tensors(path, wanted), path)
    return net


ENTRY = Entry(CARD, TINY, tower, load)
