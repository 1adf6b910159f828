from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cdt_train.encoders.conv2d import PathEncoder
from cdt_train.encoders.turned import TURNS, TurnedConv2d, TurnedNorm, for_inference


def layers() -> nn.Sequential:
    """A lifting layer, a strided one and a plain one, with statistics that are no longer fresh."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Sequential(TurnedConv2d(3, 8, 6, 2, lifts=True), TurnedNorm(8), nn.ReLU()),
        nn.Sequential(TurnedConv2d(8, 16, 4, 2), TurnedNorm(16), nn.ReLU()),
        nn.Sequential(TurnedConv2d(16, 16, 3), TurnedNorm(16)),
    )
    made(torch.rand(4, 3, 32, 32))
    for _, norm, *_ in made:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made.eval()


def turned(images: Tensor, turns: int) -> Tensor:
    return torch.rot90(images, turns, (-2, -1))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_features_turn_with_the_image(turns: int) -> None:
    net, images = layers(), torch.rand(2, 3, 32, 32)
    plain, after = net(images), net(turned(images, turns))
    moved = plain.reshape(2, -1, TURNS, 8, 8).roll(turns, dims=2).reshape(plain.shape)
    assert torch.allclose(after, turned(moved, turns), atol=1e-5)
    assert not torch.allclose(after, turned(plain, turns), atol=1e-2)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (6, 2)])
def test_a_layer_divides_the_side_by_its_stride(kernel: int, stride: int) -> None:
    found = TurnedConv2d(4, 8, kernel, stride)(torch.zeros(1, 4, 16, 16))
    assert found.shape == (1, 8, 16 // stride, 16 // stride)


def test_ordinary_convolutions_do_the_same_at_inference() -> None:
    net, images = layers(), torch.rand(2, 3, 32, 32)
    plain = for_inference(net)
    kinds = {type(module) for module in plain.modules()}
    assert kinds == {nn.Sequential, nn.Conv2d, nn.Identity, nn.ReLU}
    assert torch.allclose(plain(images), net(images), atol=1e-5)
    assert isinstance(net[0][0], TurnedConv2d)  # the copy left it alone


def test_a_turned_tile_has_the_same_mean_token() -> None:
    torch.manual_seed(0)
    encoder = PathEncoder(3, (8, 8, 16, 16), 12)
    tiles = torch.randint(0, 256, (3, 3, 64, 64)).to(torch.uint8)
    encoder(tiles)  # statistics of a batch
    encoder.eval()
    tokens, after = encoder(tiles), encoder(turned(tiles, 1))
    assert torch.allclose(tokens.mean(dim=1), after.mean(dim=1), atol=1e-5)
    assert not torch.allclose(tokens, after, atol=1e-3)  # tokens move with the tile
