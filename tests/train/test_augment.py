from __future__ import annotations

import torch

from cdt_train.augment import TileAugmentation, paired_views

TILES = torch.randint(
    0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
VOLUMES = torch.rand(3, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(tiles: torch.Tensor, seed: int, **options: float) -> torch.Tensor:
    given: dict[str, float] = {"channel_dropout": 0.5, **options}
    change = TileAugmentation(size=tiles.shape[-1], min_crop=0.6, rgb=False, **given)
    return change(tiles, seeded(seed))


def test_tiles_stay_in_range_and_hang_on_the_seed() -> None:
    first, again, other = (augmented(TILES, s) for s in (1, 1, 2))
    assert first.shape == TILES.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_channel_dropout_hides_whole_channels_one_a_tile() -> None:
    full = torch.full((200, 3, 8, 8), 255, dtype=torch.uint8)
    hidden = augmented(full, 0).amax(dim=(2, 3)) == 0
    assert hidden.sum(dim=1).max() == 1
    assert 60 < hidden.any(dim=1).sum() < 140
    assert not (augmented(full, 0, channel_dropout=0.0).amax(dim=(2, 3)) == 0).any()


def test_both_views_show_the_same_place() -> None:
    where = torch.linspace(-1, 1, 8)[None, None, :, None, None].expand(3, 1, 8, 32, 32)
    views, _ = paired_views(where.contiguous(), seeded(3))
    assert views.shape == (6, 1, 8, 16, 16)
    means = views.mean(dim=(1, 2, 3, 4))
    assert (means[:3] - means[3:]).abs().max() < 0.35
    assert torch.equal(views, paired_views(where.contiguous(), seeded(3))[0])


def test_views_of_a_pair_differ() -> None:
    views, _ = paired_views(VOLUMES, seeded(0))
    assert not torch.equal(views[:3], views[3:])
    assert views.min() >= -1
    assert views.max() <= 1


def test_gray_tiles_lose_their_colours_and_others_keep_them() -> None:
    change = TileAugmentation(size=32, min_crop=0.9, rgb=True, gray=0.5)
    changed = change(TILES.repeat(20, 1, 1, 1), seeded(0))
    colourless = (changed.amax(dim=1) - changed.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert 40 < colourless.sum() < 80


def test_stains_mix_across_colours_and_white_stays_white() -> None:
    options = {"size": 32, "min_crop": 0.9, "rgb": True, "stain_jitter": 0.0}
    red = torch.ones(40, 3, 32, 32)
    red[:, 1:] = 0.2  # absorbs green and blue alone
    plain = TileAugmentation(**options)(red, seeded(0))
    mixed = TileAugmentation(**options, stain_mix=0.2)(red, seeded(0))
    assert plain[:, 1:].std() < 0.1
    assert mixed.amin(dim=(2, 3)).std(dim=0).min() > plain.amin(dim=(2, 3)).std(dim=0).max()
    white = TileAugmentation(**options, stain_mix=0.2)(torch.ones(8, 3, 32, 32), seeded(0))
    assert white.min() > 0.99
