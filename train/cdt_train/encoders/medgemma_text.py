"""MedGemma as a whole: what it says of a CT in words, and features from inside its language model.

In 4 bits (NF4 with double quantisation, computed in bfloat16) it takes 3 GB in place of 9. This is
for research on a workstation: it is neither exported nor part of a bundle.

Sources: the model card of google/medgemma-1.5-4b-it; QLoRA, Dettmers et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_input import ct_slices, image_input
from cdt_runtime.errors import CheckpointError, MissingDependencyError
from cdt_train.encoders.look_up import weights_identity
from cdt_train.encoders.medgemma import CARD

if TYPE_CHECKING:
    from torch import Tensor

    from cdt_runtime.encoder_card import EncoderCard

Float = NDArray[np.float32]
INSTRUCTION = (
    "You are shown slices of one CT volume in order, each with its number. Judge them together."
)
QUESTION = "What do these slices show? Name the findings that matter and how sure you are."
MOST_WORDS = 300
"""Tokens of an answer, at most."""

TOWER = 8
"""Slices that pass the image tower at a time."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """The whole model, loaded.

    Attributes:
        net: of transformers.
        card: of the image tower, which says how slices are shown.
        weights_sha256: identity of the weights.
        quantised: whether it is in 4 bits.
    """

    net: Any
    card: EncoderCard
    weights_sha256: str
    quantised: bool

    def image_features(self, hu: Float) -> tuple[Tensor, Tensor]:
        """Encode the slices of a CT `(D, H, W)`: patches `(n, P, 1152)` and soft tokens of them."""
        import torch

        spec = self.card.input
        assert spec.volume is not None
        shown = [image_input(one, spec) for one in ct_slices(hu, spec.volume)]
        images = torch.from_numpy(np.stack(shown)).to(self.net.dtype)
        seen, soft = [], []
        with torch.no_grad():
            for part in torch.split(images, TOWER):
                patches = self.net.model.vision_tower(pixel_values=part).last_hidden_state
                seen.append(patches)
                soft.append(self.net.model.multi_modal_projector(patches))
        return torch.cat(seen), torch.cat(soft)

    def semantic_features(self, hu: Float, identity: str, cache: TokenCache) -> Float:
        """Mean of the language model's last layer over the slices' tokens, or what is kept of it.

        Args:
            hu: `(D, H, W)`.
            identity: of the series.
            cache: keeps the answer.

        Returns:
            `(width,)` float32, 2560 for the full model.
        """
        import hashlib

        import torch

        bits = "nf4" if self.quantised else "full"
        parts = ("semantic", identity, self.weights_sha256, bits)
        key = hashlib.sha256("|".join(parts).encode()).hexdigest()
        width = self.net.config.text_config.hidden_size
        kept = cache.get(key, (width,))
        if kept is not None:
            return kept
        _, soft = self.image_features(hu)
        with torch.no_grad():
            inside = self.net.model.language_model(inputs_embeds=soft.flatten(0, 1)[None])
        found: Float = inside.last_hidden_state[0].float().mean(dim=0).numpy()
        cache.put(key, found)
        return found

    def describe(self, hu: Float, processor: Any, question: str = QUESTION) -> str:
        """Answer a question about a CT in words; always the likeliest, so always the same.

        Args:
            hu: `(D, H, W)`.
            processor: of transformers, for this model.
            question: what is asked.
        """
        import torch

        spec = self.card.input.volume
        assert spec is not None
        asked = processor.apply_chat_template(
            messages(list(ct_slices(hu, spec)), question),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = self.net.generate(**asked, max_new_tokens=MOST_WORDS, do_sample=False)
        said: str = processor.decode(
            made[0][asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return said.strip()


def load_language_model(
    path: Path, card: EncoderCard = CARD, *, quantised: bool = True
) -> LanguageModel:
    """Load the whole model from a folder that transformers saved.

    Args:
        path: with its weights.
        card: of its image tower.
        quantised: in 4 bits; else in bfloat16.

    Raises:
        MissingDependencyError: transformers or bitsandbytes is not installed.
        CheckpointError: a tensor is missing, or the folder can't be read.
    """
    try:
        import bitsandbytes  # noqa: F401
        import torch
        from transformers import BitsAndBytesConfig, Gemma3ForConditionalGeneration
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed: pip install 'cdt-edge[haidef]'"
        ) from error
    options: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    try:
        net, report = Gemma3ForConditionalGeneration.from_pretrained(
            path, output_loading_info=True, attn_implementation="sdpa", **options
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read: {str(error).splitlines()[0]}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} tensors, first {', '.join(missing[:3])}: it may be of "
            f"another release of transformers"
        )
    return LanguageModel(net.eval(), card, weights_identity(path), quantised)


def load_processor(path: Path) -> Any:
    """Load what brings messages to token ids and pixels; it lies beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path, local_files_only=True, use_fast=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no processor that can be read: put the tokenizer and preprocessor files of "
            f"the same repository there"
        ) from error


def messages(slices: Sequence[NDArray[np.uint8]], question: str) -> list[dict[str, Any]]:
    """Lay out what is asked: the instruction, each slice with its number, the question."""
    from PIL import Image

    content: list[dict[str, Any]] = [{"type": "text", "text": INSTRUCTION}]
    for number, one in enumerate(slices, 1):
        content.append({"type": "image", "image": Image.fromarray(one)})
        content.append({"type": "text", "text": f"SLICE {number}"})
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
