"""MedSigLIP-448: image and text towers that were trained to agree on medical images.

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
TEXT_TOKENS = 64
"""Length that a class description is padded to."""


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


def zero_shot(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Score images against class descriptions.

    Args:
        images: `(B, D)` embeddings of the image tower.
        texts: `(K, D)` embeddings of the text tower, of descriptions padded to 64 tokens.
        scale: logarithm of the factor, as the weights hold it.
        bias: added to every score.

    Returns:
        `(B, K)` logits; their sigmoid is the probability that image and description agree.

    Source: Zhai et al. 2023, eq. 1.
    """
    from torch.nn.functional import normalize

    return scale.exp() * normalize(images, dim=1) @ normalize(texts, dim=1).T + bias


def load_text(path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Load the text tower with the scale and bias of `zero_shot`.

    Returns:
        A module that brings token ids `(K, 64)` to embeddings `(K, D)`, scale and bias.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from torch import nn
    from transformers import SiglipConfig, SiglipTextModel

    from cdt_train.encoders.tensors import behind, load_exactly, read_tensors

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SiglipTextModel(SiglipConfig.from_pretrained(path).text_config)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.net(input_ids=ids).pooler_output
            return found

    tower = Tower()
    tensors = read_tensors(path, behind("text_model.", "logit_scale", "logit_bias"))
    factors = _Factors()
    load_exactly(factors.net, {k: v for k, v in tensors.items() if k.startswith("logit")}, path)
    load_exactly(tower.net, tensors, path)
    return tower.eval(), factors.net.logit_scale.detach(), factors.net.logit_bias.detach()


class _Factors:
    """The two figures of `zero_shot`, as a network whose tensors have to be there."""

    def __init__(self) -> None:
        import torch

        self.net: Any = torch.nn.Module()
        self.net.logit_scale = torch.nn.Parameter(torch.zeros(1))
        self.net.logit_bias = torch.nn.Parameter(torch.zeros(1))


ENTRY = Entry(CARD, TINY, image_tower, load)
