from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import tiny_model

from cdt_train.augment import TileAugmentation
from cdt_train.data.arrays import TileArrays
from cdt_train.episodes import EpisodeSampler
from cdt_train.scores import draw_episodes
from cdt_train.tile_phase import TilePhase, cut_and_mix, supervised_contrast


def tile_set(groups: int = 6, copies: int = 3) -> TileArrays:
    """Two classes, bright and dark, of so many groups each."""
    count = 2 * groups * copies
    labels = np.repeat([0, 1], groups * copies)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 90, (count, 3, 32, 32)) + 120 * labels[:, None, None, None]
    return TileArrays(
        torch.from_numpy(pixels.astype(np.uint8)),
        labels,
        np.repeat(np.arange(2 * groups), copies),
        ("dark", "bright"),
        tuple(str(i) for i in range(count)),
        tuple(str(i) for i in range(count)),
    )


def phase(**options: float) -> TilePhase:
    tiles = tile_set()
    model = tiny_model()
    model.path_encoder.standardise_by(tiles.tiles)
    sampler = EpisodeSampler(
        tiles.labels, tiles.groups, tiles.classes, n_way=2, k_shot=1, n_query=2
    )
    given = {"cutmix": 0.0, "supcon_weight": 0.5, "view_weight": 0.0, **options}
    return TilePhase(
        model,
        tiles,
        tiles,
        draw_episodes(sampler, 20, [0]),
        augmentation=TileAugmentation(size=32, min_crop=0.8, rgb=True),
        batch_size=8,
        seed=0,
        device=torch.device("cpu"),
        **given,
    )


def test_a_step_hangs_on_its_index_alone() -> None:
    first, again = phase().step(4, 0.0), phase().step(4, 0.9)
    assert first["loss"] == again["loss"]
    assert first["loss"] != phase().step(5, 0.0)["loss"]


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {"classifier_loss", "class_contrast", "accuracy"}),
        ({"supcon_weight": 0.0}, {"classifier_loss", "accuracy"}),
        ({"view_weight": 0.5}, {"classifier_loss", "class_contrast", "view_contrast", "accuracy"}),
        ({"cutmix": 1.0}, {"classifier_loss"}),
    ],
)
def test_the_terms_are_those_that_were_asked_for(
    options: dict[str, float], terms: set[str]
) -> None:
    made = phase(**options)
    found = made.step(0, 0.0)
    assert set(found) == {"loss", *terms}
    found["loss"].backward()
    encoder = made.model.path_encoder
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.stem.parameters())


def test_a_batch_holds_classes_alike_and_no_group_twice() -> None:
    made = phase()
    tiles = tile_set()
    for seed in range(5):
        chosen = made._draw(np.random.default_rng(seed))
        assert np.bincount(tiles.labels[chosen]).tolist() == [4, 4]
        assert len(set(tiles.groups[chosen])) == 8


def test_it_learns_what_is_easy() -> None:
    made = phase()
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=3e-3)
    for index in range(25):
        loss = made.step(index, 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert made.validate()["score"] > 0.95


def test_mixed_tiles_hold_a_patch_of_their_partner() -> None:
    tiles = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16).contiguous()
    mixed, partners, kept = cut_and_mix(tiles, np.random.default_rng(2))
    for row, partner in enumerate(partners.tolist()):
        own = (mixed[row] == row).float().mean().item()
        assert set(mixed[row].unique().tolist()) <= {float(row), float(partner)}
        assert own == pytest.approx(1.0 if partner == row else kept)
    assert 0 < kept < 1


def test_the_contrast_of_classes_is_least_where_classes_are_apart() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert supervised_contrast(apart, labels, 0.1) < 0.01
    assert supervised_contrast(apart, torch.tensor([0, 1, 0, 1]), 0.1) > 5
    alone = supervised_contrast(apart, torch.tensor([0, 1, 2, 3]), 0.1)
    assert alone == 0
