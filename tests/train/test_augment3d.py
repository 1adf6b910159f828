from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdt_train import augment3d
from cdt_train.augment3d import augment_volumes, is_mask, mirrored_views, unit_range


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def corner(shape: tuple[int, int, int]) -> Tensor:
    """A volume whose 8 corners all differ."""
    volume = torch.zeros(1, 1, *shape)
    for index in range(8):
        place = [-1 if index >> axis & 1 else 0 for axis in range(3)]
        volume[0, 0, place[0], place[1], place[2]] = index + 1
    return volume


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrors and right-angle turns alone."""
    for name in ("TURN", "SCALE", "SHIFT"):
        monkeypatch.setattr(augment3d, name, 0.0)


@pytest.mark.usefixtures("exact")
def test_without_the_small_changes_voxels_only_swap_places() -> None:
    volumes = torch.rand(32, 2, 5, 5, 5)
    moved = augment_volumes(volumes, mask=True, generator=generator())
    before, after = volumes.flatten(2).sort().values, moved.flatten(2).sort().values
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert not torch.allclose(moved, volumes)


def orientations(shape: tuple[int, int, int], count: int) -> int:
    volumes = corner(shape).expand(count, -1, -1, -1, -1)
    moved = augment_volumes(volumes, mask=True, generator=generator())
    return len(torch.unique(moved.round().flatten(1), dim=0))


@pytest.mark.usefixtures("exact")
def test_a_cube_takes_all_48_orientations_a_slab_those_that_keep_its_axes() -> None:
    assert orientations((4, 4, 4), 1000) == 48
    assert orientations((3, 4, 4), 500) == 16
    assert orientations((2, 3, 4), 300) == 8


def test_small_changes_keep_the_size_of_a_shape_within_reason() -> None:
    volumes = torch.zeros(64, 1, 16, 16, 16)
    volumes[:, :, 5:11, 5:11, 5:11] = 1
    moved = augment_volumes(volumes, mask=True, generator=generator())
    sizes = moved.sum(dim=(1, 2, 3, 4)) / 216
    assert 0.7 < sizes.min() < 0.95
    assert 1.05 < sizes.max() < 1.6
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-5


def test_intensities_change_for_images_and_not_for_shapes() -> None:
    flat = torch.full((4, 1, 8, 8, 8), 0.5)
    moved = augment_volumes(flat, mask=False, generator=generator())
    assert moved.std() > 0.01
    inner = augment_volumes(flat, mask=True, generator=generator())[:, :, 3:5, 3:5, 3:5]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5))


def test_the_seed_decides_and_each_volume_has_its_own_change() -> None:
    volume = torch.rand(1, 1, 8, 8, 8).expand(4, -1, -1, -1, -1)
    first = augment_volumes(volume, mask=True, generator=generator(1))
    again = augment_volumes(volume, mask=True, generator=generator(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment_volumes(volume, mask=True, generator=generator(2)))
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_bytes_come_to_one_and_masks_are_told_from_images() -> None:
    mask = torch.tensor([0, 255, 255, 0], dtype=torch.uint8)
    assert unit_range(mask).tolist() == [0, 1, 1, 0]
    assert is_mask(mask)
    assert is_mask(mask / 255.0)
    shrunk = torch.nn.functional.avg_pool3d(corner((8, 8, 8)).clamp_max(1).repeat(4, 1, 1, 1, 1), 2)
    shrunk[:, :, 1:3, 1:3] = 1
    assert is_mask(shrunk)
    assert not is_mask(torch.arange(256, dtype=torch.uint8))
    assert not is_mask(torch.randn(8, 8, 8))
    assert not is_mask(torch.zeros(8))


def test_mirrored_views_are_all_and_all_different() -> None:
    views = mirrored_views(corner((3, 3, 3)))
    assert len(views) == 8
    assert len(torch.unique(torch.stack(views).flatten(1), dim=0)) == 8
    assert len(mirrored_views(torch.rand(1, 3, 4, 4))) == 4
