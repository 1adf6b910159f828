"""A foundation encoder as the tile encoder itself."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import tiny_model

from cdt_runtime.errors import RecipeError
from cdt_train.config import ModelRecipe
from cdt_train.encoders.chosen import chosen_path_encoder, path_card
from cdt_train.encoders.foundation_path import FoundationPath, quarters
from cdt_train.encoders.registry import TINY_RANDOM, load_encoder


def tiles(side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, side, side), generator=generator).to(torch.uint8)


def path(key: str = "medsiglip", rank: int = 0) -> FoundationPath:
    recipe = ModelRecipe(
        path_encoder=key, lora_rank=rank, feature_dim=16, encoder_weights={key: TINY_RANDOM}
    )
    found = chosen_path_encoder(recipe, 3, 0)
    assert found is not None
    return found


@pytest.mark.parametrize(("key", "tokens"), [("medsiglip", 16), ("path-foundation", 1)])
def test_tiles_of_any_size_and_type_become_tokens(key: str, tokens: int) -> None:
    encoder = path(key)
    found = encoder(tiles())
    assert found.shape == (3, tokens, 16)
    assert encoder(tiles(96)).shape == (3, tokens, 16)
    assert torch.allclose(encoder(tiles().float() / 255), found, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_its_weights_are_shared_and_stand_in_no_checkpoint() -> None:
    model = tiny_model(path_encoder=path(rank=2))
    names = [name for name in model.state_dict() if name.startswith("path_encoder.")]
    kinds = {name.split(".")[1] for name in names}
    assert kinds == {"down", "up", "project"}
    assert copy.deepcopy(model).path_encoder._shared is model.path_encoder._shared
    model.train()
    assert not any(part.training for part in model.path_encoder._shared.module.modules())


def test_frozen_nothing_but_the_projection_learns() -> None:
    encoder = path()
    encoder(tiles()).sum().backward()
    assert [name for name, one in encoder.named_parameters() if one.grad is not None] == [
        *("project.0.weight", "project.0.bias", "project.1.weight", "project.1.bias")
    ]
    assert all(not one.requires_grad for one in encoder._shared.module.parameters())


def test_low_rank_changes_start_at_nothing_learn_and_are_exported() -> None:
    plain, changed = path(), path(rank=2)
    changed.project.load_state_dict(plain.project.state_dict())
    assert torch.allclose(changed(tiles()), plain(tiles()), atol=1e-6)
    changed(tiles()).square().sum().backward()
    assert len(changed.up) == 4  # q and v of two layers
    assert all(up.grad is not None and up.grad.abs().sum() > 0 for up in changed.up)
    with torch.no_grad():
        for up in changed.up:
            up.normal_(std=0.5)
    assert not torch.allclose(changed(tiles()), plain(tiles()), atol=1e-3)
    assert torch.allclose(changed.merged()(tiles()), changed(tiles()), atol=1e-5)
    assert torch.allclose(path()(tiles()), plain(tiles()), atol=1e-6)  # the shared are as before


def test_tokens_are_averaged_over_a_grid() -> None:
    grid = torch.arange(64.0).reshape(1, 64, 1)
    found = quarters(grid).flatten()
    assert len(found) == 16
    assert found[0] == (0 + 1 + 8 + 9) / 4
    assert torch.equal(quarters(grid[:, :7]), grid[:, :7])


def test_what_can_not_be_is_refused() -> None:
    weights = dict.fromkeys(("medsiglip", "medgemma", "path-foundation"), TINY_RANDOM)
    cases = [
        ({"path_encoder": "medsiglip"}, 6, r"path_encoder: medsiglip takes R, G, B; the tiles hav"),
        ({"path_encoder": "medgemma"}, 3, r"path_encoder: medgemma does not look at tiles"),
        ({"lora_rank": 3}, 3, r"lora_rank: 3: conv2d learns as a whole"),
        (
            {"path_encoder": "path-foundation", "lora_rank": 2},
            3,
            r"lora_rank: path-foundation has none of the layers q_proj",
        ),
    ]
    for values, channels, message in cases:
        recipe = ModelRecipe(**{"encoder_weights": weights, **values})
        with pytest.raises(RecipeError, match=message):
            chosen_path_encoder(recipe, channels, 0)
    assert path_card(ModelRecipe()) is None
    assert chosen_path_encoder(ModelRecipe(), 3, 0) is None
    assert load_encoder("medsiglip", TINY_RANDOM).card == path().card
