"""Modules as they are at inference."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def for_inference(module: nn.Module) -> nn.Module:
    """Copy a module for inference: each convolution and its norm as one convolution.

    Joined in float32, they lose less when the copy is then cast to half precision.

    Args:
        module: in it a convolution with a norm of its own stands before that norm, first and
            second of an `nn.Sequential`.
    """
    made = copy.deepcopy(module).eval()
    for part in [each for each in made.modules() if isinstance(each, nn.Sequential)]:
        conv, norm = part[0], part[1]
        if isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, _BatchNorm):
            part[0], part[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return made
