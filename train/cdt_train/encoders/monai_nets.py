"""CT encoders that MONAI builds: MedicalNet, the encoder of SwinUNETR, and CT-FM.

Sources: Chen et al. 2019 (MedicalNet); Tang et al. 2022 (SwinUNETR); Pai et al. 2025 (CT-FM).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.encoder_card import EncoderCard, InputSpec, VolumeSpec
from cdt_train.encoders.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = ("*.safetensors", "*.pt", "*.pth")


def _spec(
    windows: tuple[tuple[float, float], ...], shape: tuple[int, int, int], **rest: Any
) -> InputSpec:
    volume = VolumeSpec(windows, shape=shape, **rest)
    return InputSpec(size=shape[1], layout="NCDHW", mean=(0.0,), std=(1.0,), volume=volume)


MEDICALNET = EncoderCard(
    key="medicalnet",
    title="MedicalNet, 3D ResNet-50",
    modality="ct",
    source="TencentMedicalNet/MedicalNet-Resnet50",
    licence="MIT",
    licence_url="https://github.com/Tencent/MedicalNet",
    commercial=True,
    embedding_dim=2048,
    pooling="mean over the last stage",
    input=_spec(((-1000.0, 1000.0),), (64, 128, 128)),
    packages=("monai",),
    extra="monai",
    verified="random",
)
SWIN = replace(
    MEDICALNET,
    key="swinunetr",
    title="SwinUNETR, self-supervised encoder",
    source="Project-MONAI/research-contributions, SwinUNETR/Pretrain",
    licence="Apache 2.0",
    licence_url="https://github.com/Project-MONAI/research-contributions",
    embedding_dim=768,
    packages=("monai", "einops"),
    input=_spec(((-175.0, 250.0),), (96, 96, 96), spacing_mm=(1.5, 1.5, 2.0), orientation="RAS"),
)
CTFM = replace(
    MEDICALNET,
    key="ct-fm",
    title="CT-FM, feature extractor",
    source="project-lighter/ct_fm_feature_extractor",
    licence="Apache 2.0",
    licence_url="https://huggingface.co/project-lighter/ct_fm_feature_extractor",
    embedding_dim=512,
    input=_spec(((-1024.0, 2048.0),), (64, 128, 128), spacing_mm=(3.0, 1.5, 1.5)),
)


def _medicalnet(card: EncoderCard) -> Any:
    from monai.networks.nets import resnet10, resnet50

    tiny = card.embedding_dim < MEDICALNET.embedding_dim
    options: dict[str, Any] = {"spatial_dims": 3, "n_input_channels": 1, "feed_forward": False}
    options |= {"shortcut_type": "B", "bias_downsample": False}
    return resnet10(widen_factor=0.125, **options) if tiny else resnet50(**options)


def _swin(card: EncoderCard) -> Any:
    from monai.networks.nets import SwinUNETR, swin_unetr

    swin_unetr.compute_mask = _kept(swin_unetr.compute_mask)
    width = card.embedding_dim // 16
    return SwinUNETR(in_channels=1, out_channels=14, feature_size=width, spatial_dims=3).swinViT


def _kept(compute: Any) -> Any:
    """Take the thousands of steps to an attention mask once: it depends on sizes alone.

    An export that recorded them would take ten minutes, one that holds the masks 200 MB. What is
    kept is which voxels of a window may see each other, as a number each.
    """
    if hasattr(compute, "groups"):
        return compute
    groups: dict[Any, Tensor] = {}

    def mask(dims: Any, window: Any, shift: Any, device: Any) -> Tensor:
        key = (*map(int, (*dims, *window, *shift)), str(device))
        if key not in groups:
            groups[key] = (compute(dims, window, shift, device) == 0).int().argmax(dim=2)
        own = groups[key]
        apart = own.unsqueeze(1) != own.unsqueeze(2)
        return apart.float() * -100.0

    mask.groups = groups  # type: ignore[attr-defined]
    return mask


def _ctfm(card: EncoderCard) -> Any:
    from monai.networks.nets.segresnet_ds import SegResEncoder

    return SegResEncoder(
        spatial_dims=3,
        in_channels=1,
        init_filters=card.embedding_dim // 16,
        blocks_down=(1, 2, 2, 4, 4),
        head_module=None,
    )


def _with(make: Any) -> Any:
    """Let a net of MONAI give the mean of its last features alone."""

    def build(card: EncoderCard) -> nn.Module:
        from torch import nn

        inner = make(card)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, volumes: Tensor) -> tuple[Tensor]:
                found = self.inner(volumes)
                last = found[-1] if isinstance(found, list | tuple) else found
                return (last.flatten(2).mean(dim=2) if last.ndim > 2 else last,)

        return Net()

    return build


def _load(build: Any) -> Any:
    def load(path: Path, card: EncoderCard) -> nn.Module:
        from cdt_train.encoders.tensors import load_exactly
        from cdt_train.encoders.timm_vits import weights_file
        from cdt_train.encoders.weights import read_weights

        net: Any = build(card)
        weights = {_named(name): value for name, value in read_weights(weights_file(path)).items()}
        load_exactly(net.inner, weights, path)
        found: nn.Module = net
        return found

    return load


def _named(name: str) -> str:
    """Bring a name in a file to that of the net: without what wraps it, in today's words."""
    for prefix in ("module.", "model.", "encoder.", "swinViT."):
        name = name.removeprefix(prefix)
    return name.replace("mlp.fc1.", "mlp.linear1.").replace("mlp.fc2.", "mlp.linear2.")


def _entry(card: EncoderCard, make: Any, width: int, side: int) -> Entry:
    volume = card.input.volume
    assert volume is not None
    small = replace(card.input, size=side, volume=replace(volume, shape=(side, side, side)))
    build = _with(make)
    return Entry(card, replace(card, embedding_dim=width, input=small), build, _load(build), FILES)


ENTRIES = (
    _entry(MEDICALNET, _medicalnet, 64, 32),
    _entry(SWIN, _swin, 192, 32),
    _entry(CTFM, _ctfm, 128, 32),
)
