from __future__ import annotations

import numpy as np
import torch

from cdt_train.augment import stretch_cubes
from cdt_train.cubes import ROOM, SHIFT, SIDE, UNIT_VOXELS, cut_cube, draw_pairs, windowed

GRID = torch.meshgrid(torch.arange(60), torch.arange(70), torch.arange(80), indexing="ij")
VOLUME = (GRID[0] * 10).to(torch.int16)


def test_a_cube_is_cut_around_its_centre_and_repeats_the_border() -> None:
    cube = cut_cube(VOLUME, np.array([30, 35, 40]))
    assert cube.shape == (SIDE, SIDE, SIDE)
    assert cube[SIDE // 2, 0, 0] == 300
    edge = cut_cube(VOLUME, np.array([0, 0, 0]))
    assert (edge[: SIDE // 2] == 0).all()


def test_pairs_lie_close_and_places_are_decimetres_with_left_and_right_alike() -> None:
    cubes = draw_pairs([VOLUME, VOLUME + 1000], 6, np.random.default_rng(0))
    assert cubes.pixels.shape == (12, 1, ROOM, ROOM, ROOM)
    apart = (cubes.places[:6] - cubes.places[6:]).abs() * UNIT_VOXELS
    assert apart.max() <= SHIFT + 1e-4
    assert torch.equal(cubes.volume[:6], cubes.volume[6:])
    assert cubes.places[:, 2].max() <= 40 / UNIT_VOXELS
    middle = cubes.pixels[:, 0, ROOM // 2, ROOM // 2, ROOM // 2]
    z = cubes.places[:, 0] * UNIT_VOXELS
    assert torch.allclose(middle, z * 10 + 1000 * cubes.volume, atol=0.01)


def test_a_volume_of_a_few_slices_has_few_cubes() -> None:
    cubes = draw_pairs([VOLUME, VOLUME[:6]], 220, np.random.default_rng(0))
    assert 5 <= int((cubes.volume[:220] == 1).sum()) <= 40  # one in eleven


def test_cubes_of_air_are_drawn_again() -> None:
    body = torch.full((60, 60, 60), -1000, dtype=torch.int16)
    body[:, :, 40:] = 50
    cubes = draw_pairs([body], 20, np.random.default_rng(1))
    inner = cubes.pixels[:20, :, 8:40, 8:40, 8:40]
    assert ((inner > -800).float().mean(dim=(1, 2, 3, 4)) > 0.05).all()


def test_windows_become_channels_from_minus_one_to_one() -> None:
    hu = torch.tensor([-1000.0, -160.0, 40.0, 240.0, 3000.0]).reshape(1, 1, 1, 1, 5)
    found = windowed(hu, ((-1000.0, 1000.0), (-160.0, 240.0)))
    assert found.shape == (1, 2, 1, 1, 5)
    assert found[0, 1, 0, 0].tolist() == [-1, -1, 0, 1, 1]


def test_stretching_keeps_the_middle_and_hangs_on_the_seed() -> None:
    cubes = torch.zeros(4, 1, ROOM, ROOM, ROOM)
    cubes[:, :, 20:28, 20:28, 20:28] = 1
    first, again = (stretch_cubes(cubes, SIDE, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (4, 1, SIDE, SIDE, SIDE)
    assert torch.equal(first, again)
    assert (first[:, 0, 15:17, 15:17, 15:17] > 0.9).all()
    assert not torch.equal(first[0], first[1])
