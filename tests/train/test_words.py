"""Classes in words by MedSigLIP, a CT in words by MedGemma: both whole, tiny and random."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cdt_runtime.errors import CheckpointError, RecipeError
from cdt_train.cli_words import describe_command, zero_shot_command
from cdt_train.data.phantom import write_phantom
from cdt_train.encoders import medgemma, medsiglip, registry
from cdt_train.encoders.medsiglip_text import load_text, load_zero_shot, zero_shot

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
# transformers remarks on tokenizers and arguments of its own

TEXT = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 16, "projection_size": 32},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
VOCABULARY = ("SLICE", "What", "do", "is", "it", "show?", "slices", "these")
WORDS = "stain of a tumour in the lung and of normal lung with few cells or many cells"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny MedSigLIP with its tokenizer, as the hub holds one."""
    import sentencepiece
    from transformers import SiglipConfig, SiglipModel, SiglipTokenizer

    folder = tmp_path_factory.mktemp("medsiglip")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 3),
        model_writer=made,
        **{"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(made.getvalue())
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    config = SiglipConfig(
        text_config=TEXT, vision_config=medsiglip.vision_config(medsiglip.TINY).to_dict()
    )
    torch.manual_seed(0)
    net = SiglipModel(config).eval()
    net.save_pretrained(folder)
    return folder, net


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The registry's encoders have the size of the tiny ones."""
    from dataclasses import replace

    for entry in (medsiglip.ENTRY, medgemma.ENTRY):
        small = replace(entry, card=entry.tiny)
        monkeypatch.setitem(registry.ENCODERS, entry.card.key, small)
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CDT_WEIGHTS", raising=False)


def test_scores_against_descriptions_are_the_librarys(whole: tuple[Path, Any]) -> None:
    folder, net = whole
    ids = torch.randint(2, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    tower = medsiglip.load(folder, medsiglip.TINY).eval()
    describe, scale, bias = load_text(folder)
    with torch.no_grad():
        ours = zero_shot(tower(images)[0], describe(ids), scale, bias)
        expected = net(input_ids=ids, pixel_values=images).logits_per_image
    assert torch.allclose(ours, expected, atol=1e-4)


def test_words_go_to_the_model_as_the_librarys_processor_sends_them(
    whole: tuple[Path, Any],
) -> None:
    from transformers import SiglipTokenizer

    folder, net = whole
    model = load_zero_shot("medsiglip", folder)
    asked = ["a tumour", "normal lung with few cells", "many " * 40]
    ids = SiglipTokenizer.from_pretrained(folder)(
        asked, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )["input_ids"]
    assert ids.shape == (3, 16)
    with torch.no_grad():
        expected = net.text_model(input_ids=ids).pooler_output
    assert torch.allclose(model.describe(asked), expected, atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 80, 80, 3), dtype=np.uint8)
    found = model.probabilities(list(pixels), model.describe(asked))
    assert found.shape == (2, 3)
    assert ((found > 0) & (found < 1)).all()
    assert np.abs(found[0] - found[1]).max() > 1e-7


def write_tiles(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 70, 50, 3), dtype=np.uint8)
    folder.mkdir()
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{index}.png")


def test_the_command_scores_tiles_and_records_how_they_were_shown(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    write_tiles(tmp_path / "tiles")
    (tmp_path / "tiles" / "2.png").write_bytes(b"no picture")
    classes = ("--class", "tumour=a tumour = in the lung", "--class", "normal=normal lung")
    line = [str(tmp_path / "tiles"), *classes, "--weights", str(whole[0]), "--json"]
    found = {}
    for encoder in ("medsiglip", "medsiglip@padded"):
        result = CliRunner().invoke(zero_shot_command, [*line, "--encoder", encoder])
        assert result.exit_code == 2  # one is no tile; the others have their answers
        assert "error: 2.png" in result.stderr
        *rows, bad = [json.loads(one) for one in result.stdout.splitlines()]
        assert "error" in bad
        assert [Path(row["tile"]).name for row in rows] == ["0.png", "1.png"]
        for row in rows:
            assert row["encoder"] == encoder
            assert set(row["probabilities"]) == {"tumour", "normal"}
            assert row["nearest"] == max(row["probabilities"], key=row["probabilities"].get)
        found[encoder] = rows[0]["probabilities"]
    assert found["medsiglip"] != found["medsiglip@padded"]
    shown = CliRunner().invoke(zero_shot_command, [str(tmp_path / "tiles" / "0.png"), *line[1:-1]])
    assert shown.exit_code == 0
    assert shown.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (("tumour=a", "normal"), "--class 'normal': expected NAME=TEXT"),
        (("tumour=a", "tumour=b"), "each name once"),
        (("tumour=a",), "for two classes or more"),
    ],
)
def test_classes_need_a_name_and_a_text(classes: tuple[str, ...], reason: str) -> None:
    line = [word for one in classes for word in ("--class", one)]
    result = CliRunner().invoke(zero_shot_command, ["x.png", *line])
    assert result.exit_code == 2
    assert reason in result.stderr


def test_what_is_missing_for_words_is_said(whole: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="encoder uni: knows no words: take medsiglip"):
        load_zero_shot("uni")
    with pytest.raises(CheckpointError, match="encoder medsiglip: weights not on this machine"):
        load_zero_shot()
    for path in whole[0].iterdir():
        if path.name in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"no spiece\.model, which words are taken apart"):
        load_zero_shot("medsiglip", tmp_path)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MedGemma with its processor, as the hub holds one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("medgemma")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *VOCABULARY]
    marks = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    known = {word: place for place, word in enumerate([*words, *marks.values()])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        extra_special_tokens=marks,
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %} <boi> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    size = medgemma.TINY.input.size
    pictures = Gemma3ImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    Gemma3Processor(
        pictures, tokenizer, chat_template=template, image_seq_length=4
    ).save_pretrained(folder)
    text = Gemma3TextConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"query_pre_attn_scalar": 16, "sliding_window": 64, "max_position_embeddings": 512},
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=medsiglip.vision_config(medgemma.TINY, head=False).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=known["<soft>"],
        boi_token_index=known["<boi>"],
        eoi_token_index=known["<eoi>"],
    )
    torch.manual_seed(0)
    net = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(net.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    net.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_ct_is_told_in_words_or_kept_as_features(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdt_train.encoders.medgemma_text.MOST_WORDS", 5)
    write_phantom(tmp_path / "data", seed=1, n_patients=2, n_ct=1, regions_per_class=1)
    ct = next((tmp_path / "data" / "ct_data").rglob("*.dcm")).parent
    line = [str(ct), "--weights", str(language_model), "--json"]
    first, again = (CliRunner().invoke(describe_command, line) for _ in range(2))
    assert first.exit_code == 0, first.output
    said = json.loads(first.stdout)
    assert said["precision"] == "nf4"
    assert set(said["answer"].split()) <= {*VOCABULARY, "<boi>", "<soft>"}
    assert json.loads(again.stdout) == said
    kept = tmp_path / "features.npy"
    result = CliRunner().invoke(describe_command, [*line[:-1], "--features", str(kept)])
    assert result.exit_code == 0
    assert result.stdout == f"{kept}: 64 features\n"
    assert np.load(kept).shape == (64,)
    result = CliRunner().invoke(describe_command, [*line, "--features", "x", "--question", "y"])
    assert result.exit_code == 2
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes(
        (language_model / "model.safetensors").read_bytes()
    )
    (tmp_path / "bare" / "config.json").write_bytes((language_model / "config.json").read_bytes())
    line[2] = str(tmp_path / "bare")
    result = CliRunner().invoke(describe_command, line)
    assert isinstance(result.exception, CheckpointError)
    assert "no processor that can be read" in str(result.exception)
