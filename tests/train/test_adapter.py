from __future__ import annotations

import pytest
import torch

from cdt_runtime.errors import TrainingError
from cdt_train.models.adapter import TransferMaps, transfer_module


def module(**options: int) -> TransferMaps:
    torch.manual_seed(0)
    made = TransferMaps(6, 8, maps=5, rank=2, **options)
    torch.nn.init.normal_(made.left)
    return made


def test_at_the_start_every_map_is_the_identity() -> None:
    made = TransferMaps(6, 8, maps=5)
    assert torch.equal(made.maps(), torch.eye(6).expand(5, 6, 6))
    tokens = torch.randn(3, 6, 8)
    torch.testing.assert_close(made(tokens), 2 * tokens)


def test_the_blend_is_what_a_loop_over_images_and_maps_gives() -> None:
    made, tokens = module(), torch.randn(3, 6, 8)
    found = made(tokens)
    for image, weights, mixed in zip(tokens, made.weights(tokens), found, strict=True):
        blended = sum(share * one for share, one in zip(weights, made.maps(), strict=True))
        torch.testing.assert_close(mixed, image + blended @ image, rtol=1e-4, atol=1e-4)


def test_unlike_the_published_softmax_the_weights_differ_between_images() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(16, 6, 64)
    ours = TransferMaps(6, 64, maps=16)
    theirs = TransferMaps(6, 64, maps=300, temperature=1.0)
    assert theirs.weights(tokens).max() < 2 / 300  # all but uniform: one mixer for every image
    assert ours.weights(tokens).max() > 4 / 16
    assert ours.weights(tokens).sum(dim=1).allclose(torch.ones(16))


def test_every_part_learns_the_temperature_too() -> None:
    made = module()
    made(torch.randn(3, 6, 8)).square().sum().backward()
    grads = {name: weight.grad for name, weight in made.named_parameters()}
    assert set(grads) == {"keys", "left", "right", "log_temperature"}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_maps_are_of_low_rank_around_the_identity() -> None:
    rest = module().maps() - torch.eye(6)
    assert torch.linalg.matrix_rank(rest).tolist() == [2] * 5


def test_it_stands_between_two_norms_and_keeps_the_shape() -> None:
    made = transfer_module(6, 8, maps=4, rank=2)
    assert [type(part).__name__ for part in made] == ["LayerNorm", "TransferMaps", "LayerNorm"]
    assert made(torch.randn(2, 6, 8)).shape == (2, 6, 8)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(
        TrainingError, match=r"was made for 6 tokens an image, not 7: give images of the size that"
    ):
        module()(torch.randn(2, 7, 8))
