"""A tiny model, a tiny backbone and a tiny labelled data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cdt_train.data.labelled import LabelledArrays
from cdt_train.encoders.backbones import Backbone
from cdt_train.models.transfer_model import TransferModel, build_model


def tiny_model(**changes: Any) -> TransferModel:
    """The whole model for RGB tiles of 32 pixels and two classes, with 16 features."""
    options: dict[str, Any] = {
        "channels": 3,
        "n_classes": 2,
        "windows": 1,
        "feature_dim": 16,
        "num_heads": 2,
        "path_widths": (8, 8, 8, 8),
        "ct_widths": (8, 8, 8, 8),
        "bank_size": 2,
        "seed": 0,
    }
    return build_model(**{**options, **changes})


def net(seed: int = 0) -> Backbone:
    """Four tokens of 8 channels from images of 16 pixels or voxels."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 8, 8)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            flat = images.mean(dim=2) if images.ndim == 5 else images
            features: torch.Tensor = self.norm(self.conv(flat)).relu()
            return features.flatten(2).transpose(1, 2)

    return Backbone(Net(), 8)


def toy(task: Any = "binary", splits: tuple[str, ...] = ("train", "val"), **options: Any) -> Any:
    """Images whose brightness tells the class; two of each group."""
    rng = np.random.default_rng(0)
    classes = 2 if task == "binary" else 3
    truth = np.tile(np.repeat(np.arange(classes), 2), 16)
    count = len(truth)
    shape = options.get("shape", (1, 16, 16))
    images = rng.normal(size=(count, *shape)) * 40 + 60 * truth.reshape(-1, *(1,) * len(shape)) + 60
    targets: Any = truth
    if task == "multilabel":
        targets = np.stack([truth > 0, truth > 1], axis=1).astype(np.float32)
    return LabelledArrays(
        images=images.clip(0, 255).astype(np.uint8),
        targets=targets,
        task=task,
        classes=("a", "b", "c")[: targets.shape[1] if task == "multilabel" else classes],
        groups=np.arange(count) // 2,
        split=np.array([splits[i // (2 * classes) % len(splits)] for i in range(count)]),
        names=tuple(map(str, range(count))),
        warnings=(),
        fingerprint="toy",
    )
