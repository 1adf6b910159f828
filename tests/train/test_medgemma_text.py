"""MedGemma as a whole, tiny and with random weights: in 4 bits it says nearly what it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_input import ct_slices
from cdt_runtime.errors import CheckpointError
from cdt_train.encoders.medgemma import TINY
from cdt_train.encoders.medgemma_text import load_language_model, messages
from cdt_train.encoders.medsiglip import vision_config

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
# transformers and bitsandbytes remark on a CPU and on arguments of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"query_pre_attn_scalar": 16, "sliding_window": 64, "max_position_embeddings": 512},
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision_config(TINY, head=False).to_dict(),
        **{"mm_tokens_per_image": 4, "image_token_index": 290, "boi_token_index": 291},
        eoi_token_index=292,
    )
    torch.manual_seed(0)
    net = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(net.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    place = tmp_path_factory.mktemp("medgemma")
    net.to(torch.bfloat16).save_pretrained(place)
    return place


def volume(seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(-1000, 400, (9, 64, 64)).astype(np.float32)


def cosine(first: Any, second: Any) -> float:
    a, b = (np.asarray(one, np.float64).ravel() for one in (first, second))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_in_4_bits_it_sees_nearly_what_it_saw(folder: Path, tmp_path: Path) -> None:
    whole = load_language_model(folder, TINY, quantised=False)
    small = load_language_model(folder, TINY)
    kinds = {type(part).__name__ for part in small.net.modules()}
    assert "Linear4bit" in kinds
    for first, second in zip(
        *(one.image_features(volume()) for one in (whole, small)), strict=True
    ):
        assert first.shape == second.shape
        assert cosine(first.float(), second.float()) > 0.97
    caches = [TokenCache(tmp_path / name) for name in ("whole", "small")]
    said = [
        one.semantic_features(volume(), "a", cache)
        for one, cache in zip((whole, small), caches, strict=True)
    ]
    assert said[0].shape == (64,)
    assert 0.9 < cosine(*said) < 1
    other = whole.semantic_features(volume(1), "b", caches[0])
    assert np.abs(other - said[0]).max() > 1e-4
    kept = whole.semantic_features(volume(1), "a", caches[0])  # by the series, not read again
    assert np.array_equal(kept, said[0])


def test_slices_are_told_by_number_between_instruction_and_question() -> None:
    spec = TINY.input.volume
    assert spec is not None
    (message,) = messages(list(ct_slices(volume(), spec)), "What is it?")
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", *["image", "text"] * 6, "text"]
    assert [part["text"] for part in message["content"] if part["type"] == "text"][1:] == [
        *(f"SLICE {number}" for number in range(1, 7)),
        "What is it?",
    ]


class StandsForTheGatedProcessor:
    """Brings messages to ids and pixels as the processor does, with a vocabulary of numbers."""

    def apply_chat_template(self, asked: Any, **_: Any) -> dict[str, torch.Tensor]:
        ids: list[int] = []
        pixels = []
        for part in asked[0]["content"]:
            if part["type"] == "image":
                ids += [291, 290, 290, 290, 290, 292]
                small = part["image"].resize((56, 56))
                pixels.append(
                    torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 127.5 - 1
                )
            else:
                ids += [2 + len(word) for word in part["text"].split()]
        tokens = torch.tensor([ids])
        kinds = (tokens == 290).long()
        images = torch.stack(pixels).to(torch.bfloat16)
        return {"input_ids": tokens, "token_type_ids": kinds, "pixel_values": images}

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(str(int(one)) for one in ids)


def test_it_answers_in_words_and_always_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_train.encoders.medgemma_text.MOST_WORDS", 6)
    model, processor = load_language_model(folder, TINY), StandsForTheGatedProcessor()
    first, again = (model.describe(volume(), processor) for _ in range(2))
    assert first == again
    assert 1 <= len(first.split()) <= 6


def test_missing_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "mm_input_projection" in name)
    kept = {name: value for name, value in tensors.items() if name != lost}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first .*mm_input_projection_weig"):
        load_language_model(tmp_path, TINY, quantised=False)
    with pytest.raises(CheckpointError, match="can't be read"):
        load_language_model(tmp_path / "nothing", TINY)
