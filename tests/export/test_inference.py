from __future__ import annotations

import torch
from torch import nn

from cdt_export.inference import for_inference
from cdt_train.encoders.conv2d import PathEncoder


def test_convolutions_take_in_their_norms_and_do_the_same() -> None:
    torch.manual_seed(0)
    encoder = PathEncoder(3, (8, 8, 16, 16), 12)
    tiles = torch.randint(0, 256, (3, 3, 64, 64)).to(torch.uint8)
    encoder(tiles)  # statistics that are no longer fresh
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    encoder.eval()
    joined = for_inference(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in joined.modules())
    assert torch.allclose(joined(tiles), encoder(tiles), atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())  # left alone
