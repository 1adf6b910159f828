"""MedSigLIP as a whole: how well class descriptions in words fit an image, without any example.

Sources: the model card of google/medsiglip-448; SigLIP, Zhai et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoder_input import image_input
from cdt_runtime.errors import CheckpointError, MissingDependencyError, RecipeError
from cdt_train.encoders.foundation import FoundationEncoder, frozen
from cdt_train.encoders.look_up import require_weights
from cdt_train.encoders.registry import entry_of, load_encoder
from cdt_train.encoders.tensors import behind, load_exactly, read_tensors

KEY = "medsiglip"
VOCABULARY = "spiece.model"


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """Image and text tower with the two figures that make scores of them.

    Attributes:
        images: the image tower.
        text: brings token ids `(K, L)` to embeddings `(K, D)`.
        tokenizer: of transformers.
        length: L, which descriptions are padded to; the model has seen no other.
        scale: logarithm of the factor, as the weights hold it.
        bias: added to every score.
    """

    images: FoundationEncoder
    text: nn.Module
    tokenizer: Any
    length: int
    scale: Tensor
    bias: Tensor

    @property
    def card(self) -> EncoderCard:
        """Of the image tower."""
        return self.images.card

    @torch.no_grad()
    def describe(self, descriptions: Sequence[str]) -> Tensor:
        """Embed descriptions: `(K, D)`."""
        asked = self.tokenizer(
            list(descriptions),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        found: Tensor = self.text(asked["input_ids"])
        return found

    def probabilities(
        self, pixels: Sequence[NDArray[np.uint8]], texts: Tensor
    ) -> NDArray[np.float32]:
        """Tell how likely each image and description agree, each pair for itself.

        Args:
            pixels: of each image, `(H, W, 3)` RGB.
            texts: `(K, D)`, as `describe` gives them.

        Returns:
            `(B, K)`, each in 0 to 1.
        """
        seen = np.stack([image_input(one, self.card.input) for one in pixels])
        embedded = self.images.encode(torch.from_numpy(seen)).embedding
        found: NDArray[np.float32] = torch.sigmoid(
            zero_shot(embedded, texts, self.scale, self.bias)
        ).numpy()
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
    return scale.exp() * normalize(images, dim=1) @ normalize(texts, dim=1).T + bias


def load_zero_shot(key: str = KEY, weights: Path | None = None) -> ZeroShot:
    """Load both towers.

    Args:
        key: `medsiglip`, or with one of the ways to prepare images, `medsiglip@padded`.
        weights: a folder; None to look for them.

    Raises:
        RecipeError: another encoder.
        MissingDependencyError: a library is not installed.
        CheckpointError: weights or tokenizer are missing.
    """
    entry = entry_of(key)
    if entry.folder != KEY or entry.card.modality != "tile":
        raise RecipeError(f"encoder {key}: knows no words: take {KEY}, or one of its options")
    path = require_weights(entry, weights)
    folder = path.parent if path.is_file() else path
    text, scale, bias = load_text(folder)
    length = text.net.config.max_position_embeddings
    return ZeroShot(load_encoder(key, path), text, load_tokenizer(folder), length, scale, bias)


def load_text(path: Path) -> tuple[Any, Tensor, Tensor]:
    """Load the text tower with the scale and bias of `zero_shot`.

    Returns:
        A module that brings token ids `(K, 64)` to embeddings `(K, D)`, scale and bias.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    from transformers import SiglipConfig, SiglipTextModel

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SiglipTextModel(SiglipConfig.from_pretrained(path).text_config)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.net(input_ids=ids).pooler_output
            return found

    tower, factors = Tower(), _Factors()
    tensors = read_tensors(path, behind("text_model.", "logit_scale", "logit_bias"))
    load_exactly(factors, {k: v for k, v in tensors.items() if k.startswith("logit")}, path)
    load_exactly(tower.net, tensors, path)
    return frozen(tower), factors.logit_scale.detach(), factors.logit_bias.detach()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer that lies beside the weights.

    Raises:
        CheckpointError: there is none.
        MissingDependencyError: what it needs is not installed.
    """
    try:
        import sentencepiece  # noqa: F401  without it transformers says that it knows no tokenizer
        from transformers import SiglipTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"words need {error.name}, which is not installed: pip install 'cdt-edge[haidef]'"
        ) from error
    if not (path / VOCABULARY).is_file():
        raise CheckpointError(
            f"{path}: no {VOCABULARY}, which words are taken apart with: put that of the same "
            f"repository there"
        )
    return SiglipTokenizer.from_pretrained(path, local_files_only=True)


class _Factors(nn.Module):
    """The two figures of `zero_shot`, as a network whose tensors have to be there."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
