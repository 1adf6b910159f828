from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import tiny_model

from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.episodes import EpisodeSampler
from cdt_train.models.transfer_model import TransferModel
from cdt_train.rows import (
    CALIBRATED,
    differences,
    embed_rows,
    frozen_rows,
    measure,
    over_groups,
    score_rows,
    surroundings,
    temperatures,
)
from cdt_train.scores import draw_episodes

CPU = torch.device("cpu")
PATIENTS = tuple("abcdef")


def model(gate: float) -> TransferModel:
    made = tiny_model().eval()
    with torch.no_grad():
        made.bridge.gate.fill_(gate)
    return made


def tile_set() -> TileArrays:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 12)
    pixels = rng.integers(0, 200, (24, 3, 32, 32)) + 40 * labels[:, None, None, None]
    names = tuple(str(i) for i in range(24))
    tiles = torch.from_numpy(pixels.astype(np.uint8))
    return TileArrays(tiles, labels, np.repeat(np.arange(6), 4), ("x", "y"), names, names)


def volumes(patients: tuple[str, ...]) -> CtArrays:
    made = torch.rand(len(patients), 1, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    fine = tuple(torch.zeros(4, 4, 4, dtype=torch.int16) for _ in patients)
    return CtArrays(made * 2 - 1, patients, patients, fine)


def rows(gate: float, ct: CtArrays, *, paired: bool) -> dict[str, list[np.ndarray]]:  # type: ignore[type-arg]
    made = model(gate)
    around = surroundings(made, ct, ct, PATIENTS, paired=paired, seed=[0], device=CPU)
    return embed_rows(made, tile_set(), around, 0, CPU)


def test_unpaired_tiles_meet_some_volumes_in_turn_and_wrongly_another_each() -> None:
    found = rows(1.0, volumes(("r", "s", "t")), paired=False)
    assert set(found) == {"with_ct", "without_ct", "wrong_ct", "noise_ct", "context_bank"}
    assert len(found["with_ct"]) == len(found["wrong_ct"]) == 3
    for right, wrong in zip(found["with_ct"], found["wrong_ct"], strict=True):
        assert not np.allclose(right, wrong)


def test_one_volume_has_no_wrong_one_and_none_has_no_row() -> None:
    assert "wrong_ct" not in rows(1.0, volumes(("r",)), paired=False)
    assert set(rows(1.0, volumes(()), paired=False)) == {"without_ct"}


def test_paired_tiles_meet_their_own_patients_ct() -> None:
    ct = volumes(PATIENTS)
    made, tiles = model(1.0), tile_set()
    found = rows(1.0, ct, paired=True)
    for group in range(6):
        mine = tiles.groups == group
        context = made.context(ct.volumes[group : group + 1])
        with torch.no_grad():
            alone = made.bridge(made.path_encoder(tiles.tiles[torch.from_numpy(mine)]), *context)
        assert np.allclose(found["with_ct"][0][mine], alone.numpy(), atol=1e-6)
        assert not np.allclose(found["wrong_ct"][0][mine], alone.numpy(), atol=1e-4)


def test_a_closed_gate_makes_every_context_the_same_to_the_bit() -> None:
    found = rows(0.0, volumes(("r", "s")), paired=False)
    for contexts in found.values():
        for embedded in contexts:
            assert np.array_equal(embedded, found["without_ct"][0])


def test_every_row_is_scored_on_the_same_episodes() -> None:
    tiles = tile_set()
    found = rows(1.0, volumes(("r", "s")), paired=False)
    found |= frozen_rows({"untrained_encoder": model(0.0)}, tiles, tiles, CPU)
    sampler = EpisodeSampler(
        tiles.labels, tiles.groups, tiles.classes, n_way=2, k_shot=2, n_query=2
    )
    episodes = {2: draw_episodes(sampler, 60, [0])}
    scores = score_rows(found, episodes, 5.0, "mean", 0)
    assert "permuted_labels" in scores
    queries = scores["with_ct"][2].queries
    assert all(np.array_equal(row[2].queries, queries) for row in scores.values())
    heat = temperatures(scores)
    table = measure(scores, heat)
    for row, by_k in table.items():
        assert ("ece" in by_k["2"]) == (row in CALIBRATED)
    compared = differences(scores, tiles, 0)["with_ct - without_ct"]["2"]
    means = (scores["with_ct"][2].accuracy, scores["without_ct"][2].accuracy)
    assert compared["mean"] == pytest.approx(means[0] - means[1])
    assert compared["low"] <= compared["mean"] <= compared["high"]
    assert compared["groups"] == 6
    assert over_groups(scores, tiles, 0)["with_ct"]["2"]["groups"] == 6
