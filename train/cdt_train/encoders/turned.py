"""Convolutions that know a quarter turn when they see one.

Which way round a tile lies on the glass says nothing. Each filter is applied in its four quarter
turns, so that turning the tile turns the features and changes nothing else: what is learnt of one
orientation holds for all, from a quarter of the weights. Even kernels at stride 2 keep this exact;
odd ones would sample a turned tile at other pixels.

Source: Cohen and Welling 2016, the group p4; Veeling et al. 2018 for histology.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

TURNS = 4
"""Quarter turns that every filter is applied in."""


class TurnedConv2d(nn.Module):
    """A convolution whose output channels come in fours: one filter in its four quarter turns.

    Args:
        before: input channels: plain ones, or of another such layer, a multiple of 4.
        after: output channels, a multiple of 4.
        kernel: its side; even where `stride` is 2.
        stride: 1 or 2.
        lifts: the input channels are plain, as those of a tile.

    Attributes:
        weight: `(after / 4, before, kernel, kernel)`, the filters unturned.
    """

    def __init__(
        self, before: int, after: int, kernel: int, stride: int = 1, *, lifts: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.lifts = stride, (kernel - stride + 1) // 2, lifts
        deviation = math.sqrt(2 / (before * kernel**2))
        self.weight = nn.Parameter(deviation * torch.randn(after // TURNS, before, kernel, kernel))

    def turned(self) -> Tensor:
        """All filters in all turns, `(after, before, kernel, kernel)`."""
        return torch.stack([self._turned(turn) for turn in range(TURNS)], dim=1).flatten(0, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve `(B, before, S, S)` to `(B, after, S / stride, S / stride)`."""
        weight = self.turned().contiguous(memory_format=torch.channels_last)
        return functional.conv2d(features, weight, stride=self.stride, padding=self.padding)

    def _turned(self, turn: int) -> Tensor:
        weight: Tensor = self.weight
        if not self.lifts:  # turning a tile also moves each input filter to its next turn
            parts = weight.reshape(len(weight), -1, TURNS, *weight.shape[2:])
            weight = parts.roll(turn, dims=2).flatten(1, 2)
        return torch.rot90(weight, turn, (-2, -1))


class TurnedNorm(nn.Module):
    """Batch normalisation with one gain and offset for the four turns of a filter.

    Args:
        width: channels, a multiple of 4.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width // TURNS))
        self.bias = nn.Parameter(torch.zeros(width // TURNS))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise `(B, width, S, S)`."""
        mean, var = self.running_mean, self.running_var
        if not self.training:
            mean, var = _alike(mean), _alike(var)
        gain, offset = (each.repeat_interleave(TURNS) for each in (self.weight, self.bias))
        return functional.batch_norm(features, mean, var, gain, offset, self.training)

    def plain(self) -> nn.BatchNorm2d:
        """An ordinary layer that does the same at inference."""
        norm = nn.BatchNorm2d(len(self.running_mean)).eval()
        norm.weight.data, norm.bias.data = (
            each.detach().repeat_interleave(TURNS) for each in (self.weight, self.bias)
        )
        norm.running_mean, norm.running_var = _alike(self.running_mean), _alike(self.running_var)
        return norm


def for_inference(module: nn.Module) -> nn.Module:
    """Copy a module for inference: each convolution and its norm as one ordinary convolution.

    Joined in float32, they lose less when the copy is then cast to half precision.

    Args:
        module: in it a convolution with a norm of its own, turned or 3D, stands before that norm
            in an `nn.Sequential`.
    """
    made = copy.deepcopy(module).eval()
    for part in [each for each in made.modules() if isinstance(each, nn.Sequential)]:
        conv, norm = part[0], part[1]
        if isinstance(conv, TurnedConv2d) and isinstance(norm, TurnedNorm):
            conv, norm = _plain_conv(conv), norm.plain()
        if isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, _BatchNorm):
            part[0], part[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return made


def _plain_conv(conv: TurnedConv2d) -> nn.Conv2d:
    weight = conv.turned().detach()
    after, before, kernel, _ = weight.shape
    made = nn.Conv2d(before, after, kernel, conv.stride, conv.padding, bias=False).eval()
    made.weight.data = weight
    return made


def _alike(statistics: Tensor) -> Tensor:
    """The mean over the four turns of each filter, for each of them."""
    return statistics.reshape(-1, TURNS).mean(dim=1).repeat_interleave(TURNS)
