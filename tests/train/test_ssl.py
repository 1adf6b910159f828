from __future__ import annotations

import pytest
import torch

from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.ssl import CtPhase, contrast


def phase(volumes: torch.Tensor) -> tuple[CtPhase, CtEncoder]:
    torch.manual_seed(0)
    encoder = CtEncoder(1, (8, 8, 16, 16), 32)
    fine = [
        (volume[0, 0, :, :40, :40].clamp(-1, 1) * 1000).to(torch.int16)
        for volume in volumes.split(1)
    ]
    made = CtPhase(
        encoder,
        volumes,
        fine,
        windows=((-1000.0, 1000.0),),
        batch_size=8,
        temperature=0.2,
        contrast_weight=0.5,
        position_weight=1.0,
        seed=0,
        device=torch.device("cpu"),
    )
    return made, encoder


def test_the_contrast_is_small_for_matching_views_alone() -> None:
    matching = torch.eye(4, 16).repeat(2, 1)
    loss, accuracy = contrast(matching, 0.1)
    assert loss < 0.01
    assert accuracy == 1
    loss, accuracy = contrast(torch.cat([torch.eye(4, 16), torch.eye(4, 16).roll(1, 0)]), 0.1)
    assert loss > 5
    assert accuracy == 0


@pytest.mark.parametrize("index", [0, 3])  # cubes, then views of whole volumes
def test_gradients_reach_every_weight_of_the_encoder(index: int) -> None:
    volumes = torch.rand(4, 1, 8, 64, 64) * 2 - 1
    made, encoder = phase(volumes)
    made.step(index, 0.0)["loss"].backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert sum(
        float(p.grad.abs().sum()) > 0 for p in encoder.parameters() if p.grad is not None
    ) == (len(list(encoder.parameters())))


@pytest.mark.slow
def test_pretraining_learns_how_far_apart_two_cubes_lie() -> None:
    denser = torch.linspace(-1, 1, 96)[:, None, None].expand(2, 1, 96, 64, 64)
    grain = 0.2 * torch.randn(denser.shape, generator=torch.Generator().manual_seed(0))
    made, _ = phase(denser + grain)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=4e-3)
    errors = []
    for index in range(60):
        terms = made.step(index, 0.0)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        errors += [terms["position_cubes"].item()] if "position_cubes" in terms else []
    assert sum(errors[-8:]) < 0.7 * sum(errors[:8])
    assert made.validate()["score"] < 0
