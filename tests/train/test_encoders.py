"""Foundation encoders: their list, where weights are looked for, and what each of them gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cdt_runtime.ct import Volume
from cdt_runtime.encoder_card import EncoderCard, VolumeSpec
from cdt_runtime.encoder_features import feature_shape, feature_tokens
from cdt_runtime.encoder_input import ct_slices, ct_volume, image_input
from cdt_runtime.errors import (
    BundleError,
    CheckpointError,
    MissingDependencyError,
    RecipeError,
    SeriesError,
)
from cdt_train.cli_encoders import encoders_command
from cdt_train.config import ModelRecipe
from cdt_train.encoders.chosen import chosen_encoders, encoder_keys, feature_shapes
from cdt_train.encoders.entry import Entry
from cdt_train.encoders.look_up import availability, require_weights, weights_identity
from cdt_train.encoders.registry import ENCODERS, TINY_RANDOM, entry_of, identified, load_encoder

OPTIONAL = ("timm", "monai")
"""Libraries that a user brings; without them their encoders are skipped here."""


def here(key: str) -> str:
    """Skip where the library of an encoder is missing."""
    for library in OPTIONAL:
        if library in entry_of(key).card.packages and find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    return key


def pictures(count: int = 3, side: int = 80) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights on this machine, and no network."""
    monkeypatch.delenv("CDT_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("key", [*ENCODERS, "slices:medsiglip"])
def test_each_encoder_gives_what_its_card_says(key: str) -> None:
    encoder = load_encoder(here(key), TINY_RANDOM)
    card = encoder.card
    volume = card.input.volume
    if volume is not None and volume.shape is not None:
        hu = np.random.default_rng(0).uniform(-1000, 400, (3, 30, 60, 60)).astype(np.float32)
        seen = [ct_volume(one, (4.0, 2.0, 2.0), volume) for one in hu]
    else:
        seen = [image_input(one, card.input) for one in pictures()]
    images = torch.from_numpy(np.stack(seen))
    first, again = encoder.encode(images), encoder.encode(images)
    assert first.embedding.shape == (3, card.embedding_dim)
    assert torch.equal(first.embedding, again.embedding)
    assert (first.embedding[0] - first.embedding[1]).abs().max() > 1e-3
    tokens = None if first.tokens is None else first.tokens.numpy()
    assert (tokens is None) == (card.token_dim is None)
    if first.tokens is not None:
        assert first.tokens.shape[2] == card.token_dim
        assert (first.tokens[0] - first.tokens[1]).abs().max() > 1e-3
    features = feature_tokens(card, first.embedding.numpy(), tokens)
    assert features.shape == (3, *feature_shape(card))
    assert card.origin == "random-weights"
    assert card == identified(key, TINY_RANDOM)


@pytest.mark.parametrize("key", ENCODERS)
def test_cards_are_whole_and_come_back_from_json(key: str) -> None:
    card = ENCODERS[key].card
    assert EncoderCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert card.licence_url.startswith("https://")
    assert card.verified != "weights"  # none has been at hand
    with pytest.raises(BundleError, match="encoder card: keys missing or unknown: more"):
        EncoderCard.from_dict({**card.to_dict(), "more": 1})


def test_a_ct_is_brought_to_an_encoders_voxels_and_axes() -> None:
    hu = np.full((20, 40, 40), -1000.0, np.float32)
    hu[15:, 30:, 30:] = 1000  # high, at the back, on the left
    spec = VolumeSpec(((-1000.0, 1000.0),), shape=(24, 20, 20), spacing_mm=(2.0, 2.0, 2.0))
    found = ct_volume(hu, (2.0, 1.0, 1.0), spec)
    assert found.shape == (1, 24, 20, 20)
    assert (found[0, :2] == 0).all()  # filled with air
    assert (found[0, 17:22, 15:, 15:] == 1).all()
    assert found.sum() == pytest.approx(5 * 5 * 5)
    turned = ct_volume(hu, (2.0, 1.0, 1.0), replace(spec, shape=(20, 20, 24), orientation="RAS"))
    assert (turned[0, :5, :5, 17:22] == 1).all()  # on the left: low in R; at the back: low in A
    assert turned.sum() == pytest.approx(5 * 5 * 5)
    free = ct_volume(hu, (9.0, 9.0, 9.0), replace(spec, spacing_mm=None, shape=(4, 4, 4)))
    assert free[0, 3, 3, 3] == 1
    with pytest.raises(SeriesError, match=r"expected \(D, H, W\) of finite HU"):
        ct_volume(hu * np.nan, (1.0, 1.0, 1.0), spec)


def test_an_encoder_of_tiles_can_look_at_slices() -> None:
    entry = entry_of("slices:medsiglip")
    assert (entry.card.modality, entry.card.graph) == ("ct", "encoder_slices_medsiglip")
    recipe = ModelRecipe(
        encoders=("slices:medsiglip",), encoder_weights={"slices:medsiglip": TINY_RANDOM}
    )
    encoders = chosen_encoders(recipe)
    hu = np.random.default_rng(0).uniform(-1000, 400, (9, 64, 64)).astype(np.float32)
    made = Volume(hu, (5.0, 1.0, 1.0), (0.0,) * 3, ((0.0,) * 3,) * 3, "one")
    (found,) = encoders.of_volume("one", lambda: made).values()
    assert found.shape == (5, 32)
    again = encoders.of_volume("one", lambda: pytest.fail("read again"))
    assert np.array_equal(again["slices:medsiglip"], found)
    with pytest.raises(RecipeError, match="encoder slices:medgemma: medgemma is none of tiles"):
        entry_of("slices:medgemma")


def test_a_model_of_timm_by_name_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match="encoder timm:resnet18: timm is not installed: pip inst"):
        entry_of("timm:resnet18")


@pytest.mark.parametrize("key", ["medsiglip", "medgemma"])
def test_weights_come_back_and_a_missing_tensor_is_refused(key: str, tmp_path: Path) -> None:
    entry = replace(ENCODERS[key], card=ENCODERS[key].tiny)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = entry.random(entry.card).eval()
    inner = made.net if key == "medsiglip" else made
    stored = {f"model.{name}": value.contiguous() for name, value in inner.state_dict().items()}
    other = {"model.language_model.weight": torch.zeros(2)}
    save_file({**stored, **other}, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = made(images), entry.load(tmp_path, entry.card).eval()(images)
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("embeddings.patch_embedding.bias"))
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ tensors, first .*patch_embedding"):
        entry.load(tmp_path, entry.card)
    save_file({**tensors, lost: torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embedding.bias is \(7,\), expected \(32,\)"):
        entry.load(tmp_path, entry.card)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="not readable as safetensors: fetch it again"):
        entry.load(tmp_path, entry.card)


@pytest.mark.parametrize("shape", [(448, 448), (96, 96), (700, 500), (333, 901)])
def test_medsiglip_sees_a_tile_as_the_librarys_processor_does(shape: tuple[int, int]) -> None:
    from transformers import SiglipImageProcessor

    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = SiglipImageProcessor(
        size={"height": 448, "width": 448}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    expected = processor(pixels, return_tensors="np", input_data_format="channels_last")
    ours = image_input(pixels, ENCODERS["medsiglip"].card.input)
    assert np.abs(ours - expected["pixel_values"][0]).max() < 1e-6


@pytest.mark.parametrize("shape", [(512, 512), (96, 130)])
def test_medgemma_sees_a_slice_as_the_librarys_processor_does(shape: tuple[int, int]) -> None:
    from transformers import Gemma3ImageProcessor

    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = Gemma3ImageProcessor(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    expected = processor(pixels, return_tensors="np", input_data_format="channels_last")
    ours = image_input(pixels, ENCODERS["medgemma"].card.input)
    assert np.abs(ours - expected["pixel_values"][0]).max() < 1e-6


def test_path_foundation_sees_bytes_as_fractions_with_channels_last() -> None:
    pixels = pictures(1, 224)[0]
    ours = image_input(pixels, ENCODERS["path-foundation"].card.input)
    assert ours.shape == (224, 224, 3)
    assert np.abs(ours - pixels.astype(np.float32) / 255).max() < 1e-7


def test_the_other_published_ways_to_medsiglip_differ_as_they_should() -> None:
    options = ENCODERS["medsiglip"].card.options
    pixels = pictures(1, 60)[0][:40]
    padded = image_input(pixels, options["padded"])
    assert (padded[:, :60] == -1).all()  # black above, -1 when standardised
    assert (padded[:, 224] > -1).any()
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (128, 128, 3))
    plain = (image_input(np.ascontiguousarray(ramp), options["tf_bilinear"]) + 1) / 2 * 255
    places = np.clip((np.arange(448) + 0.5) * 128 / 448 - 0.5, 0, 127)
    assert np.abs(plain[0, 7] - 2 * places).max() < 1e-3
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    spread = [image_input(noise, options[name]).std() for name in ("tf_bilinear", "bicubic")]
    assert spread[0] > 1.3 * spread[1]  # it looks at four neighbours alone


def test_slices_show_three_windows_and_are_spread_evenly() -> None:
    spec = ENCODERS["medgemma"].card.input.volume
    assert spec is not None
    hu = np.zeros((200, 2, 2), np.float32) + np.arange(200, dtype=np.float32)[:, None, None] - 100
    shown = ct_slices(hu, spec)
    assert shown.shape == (85, 2, 2, 3)
    first, last = (shown[place, 0, 0].tolist() for place in (0, -1))
    assert first == [round((1024 - 100) / 2048 * 255), round(35 / 350 * 255), 0]
    assert last == [round((1024 + 99) / 2048 * 255), round(234 / 350 * 255), 255]


def toy_entry(**changes: Any) -> Entry:
    return replace(
        ENCODERS["medsiglip"], card=replace(ENCODERS["medsiglip"].card, packages=(), **changes)
    )


def test_weights_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = toy_entry()
    found = availability(entry)
    assert (found.status, found.path) == ("GATED", None)
    assert "accept the licence at https://" in found.cure
    hub = tmp_path / "hub" / "models--google--medsiglip-448"
    snapshot = hub / "snapshots" / "abc"
    for folder in (snapshot, hub / "refs", tmp_path / "own" / "medsiglip", tmp_path / "given"):
        folder.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    assert availability(entry).status == "GATED"  # an empty snapshot
    (snapshot / "model.safetensors").touch()
    assert availability(entry).path == snapshot
    monkeypatch.setenv("CDT_WEIGHTS", str(tmp_path / "own"))
    (tmp_path / "own" / "medsiglip" / "model.safetensors").touch()
    assert availability(entry).path == tmp_path / "own" / "medsiglip"
    (tmp_path / "given" / "part.safetensors").touch()
    assert require_weights(entry, tmp_path / "given") == tmp_path / "given"
    with pytest.raises(
        CheckpointError, match=r"encoder medsiglip: no weights at .*nothing: expected"
    ):
        require_weights(entry, tmp_path / "nothing")


def test_why_an_encoder_is_not_ready_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    free = toy_entry(gated=False)
    assert availability(free).status == "NOT_CACHED"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert availability(free).status == "OFFLINE"
    with pytest.raises(CheckpointError, match="weights not on this machine, HF_HUB_OFFLINE is set"):
        require_weights(free, allow_network=True)
    lacking = toy_entry(extra=None)
    lacking = replace(lacking, card=replace(lacking.card, packages=("no_such_library",)))
    found = availability(lacking)
    assert (found.status, found.cure) == ("MISSING_DEPENDENCY", "pip install no_such_library")
    with pytest.raises(MissingDependencyError, match="encoder medsiglip: no_such_library not inst"):
        require_weights(lacking)


def test_other_weights_have_another_identity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    first = weights_identity(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert weights_identity(tmp_path) == first
    (tmp_path / "a.safetensors").write_bytes(b"two")
    assert weights_identity(tmp_path) != first


def test_recipes_name_encoders_and_the_weights_they_must_have_again(tmp_path: Path) -> None:
    weights = {"medsiglip": TINY_RANDOM, "path-foundation": TINY_RANDOM, "medgemma": TINY_RANDOM}
    recipe = ModelRecipe(use_haidef=True, encoders=("medsiglip",), encoder_weights=weights)
    assert encoder_keys(recipe) == ("medsiglip", "medgemma", "path-foundation")
    assert feature_shapes(recipe) == {
        "tile_features": {"medsiglip": (5, 32), "path-foundation": (1, 16)},
        "ct_features": {"medgemma": (4, 48)},
    }
    encoders = chosen_encoders(recipe)
    known = [card.to_dict() for card in encoders.cards.values()]
    assert chosen_encoders(recipe, known).cards == encoders.cards
    known[0]["weights_sha256"] = "other"
    with pytest.raises(CheckpointError, match="encoder medsiglip: its weights are not those that"):
        chosen_encoders(recipe, known)
    with pytest.raises(RecipeError, match=r"model\.encoder_weights: 'medsiglip' is not among"):
        encoder_keys(ModelRecipe(encoder_weights=weights))
    with pytest.raises(RecipeError, match=r"'medsigclip': unknown, did you mean medsiglip\?"):
        entry_of("medsigclip")
    with pytest.raises(
        CheckpointError, match="encoder medsiglip: weights not on this machine: acc"
    ):
        chosen_encoders(ModelRecipe(encoders=("medsiglip",)))


def test_features_are_kept_by_input_and_weights(tmp_path: Path) -> None:
    recipe = ModelRecipe(encoders=("medsiglip",), encoder_weights={"medsiglip": TINY_RANDOM})
    encoders = chosen_encoders(recipe)
    pixels = pictures(2)

    def look(index: int) -> dict[str, Any]:
        return encoders.images(pixels[index], 8, ("R", "G", "B"), "tile")

    def forbidden() -> dict[str, Any]:
        raise AssertionError("pixels were read again")

    first = encoders.of_tile("one", lambda: look(0))["medsiglip"]
    assert first.shape == (5, 32)
    again = chosen_encoders(recipe).of_tile("one", forbidden)["medsiglip"]
    assert np.array_equal(first, again)
    assert not np.allclose(encoders.of_tile("two", lambda: look(1))["medsiglip"], first)


def test_the_list_says_what_is_ready_in_an_instant_and_without_torch() -> None:
    shown = CliRunner().invoke(encoders_command, [])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert any(
        line.startswith("medsiglip") and "GATED: accept the licence" in line for line in lines
    )
    listed = json.loads(CliRunner().invoke(encoders_command, ["--json"]).output)
    assert {one["key"] for one in listed} == set(ENCODERS)
    assert {one["status"] for one in listed} <= {
        "GATED",
        "NOT_CACHED",
        "MISSING_DEPENDENCY",
        "OFFLINE",
    }
    code = (
        "import sys; from cdt_train.cli import train_command as c; "
        "c(['encoders', '--json'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'timm', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_encoder_can_be_shown_tiles_in_another_published_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = entry_of("medsiglip@padded")
    assert entry.card.input == ENCODERS["medsiglip"].card.options["padded"]
    assert entry.folder == "medsiglip"
    (tmp_path / "medsiglip").mkdir()
    (tmp_path / "medsiglip" / "model.safetensors").touch()
    monkeypatch.setenv("CDT_WEIGHTS", str(tmp_path))
    for key in ("medsiglip@padded", "slices:medsiglip"):  # the weights are those of medsiglip
        assert availability(entry_of(key)).path == tmp_path / "medsiglip"
    first, other = (load_encoder(key, TINY_RANDOM) for key in ("medsiglip", "medsiglip@padded"))
    assert other.card.input.pad
    assert other.card.to_dict()["key"] == "medsiglip@padded"
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.encode(images).embedding, other.encode(images).embedding)
    with pytest.raises(
        RecipeError, match=r"'round' is none of the published ways .*: bicubic, tf_"
    ):
        entry_of("medsiglip@round")
    with pytest.raises(RecipeError, match="there is one alone"):
        entry_of("uni@padded")
