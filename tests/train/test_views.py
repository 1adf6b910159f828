from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.encoders.backbones import Backbone, ImageShape, build_backbone
from cdt_train.engine import Engine
from cdt_train.views import Pretraining, pretrain_views, shape_statistics


def engine() -> Engine:
    return Engine.start("cpu", "fp32")


def balls(radii: list[float], side: int = 16) -> torch.Tensor:
    axis = torch.arange(side) - (side - 1) / 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = (z**2 + y**2 + x**2).sqrt()
    return torch.stack([(distance < radius).float()[None] for radius in radii])


def backbone(seed: int = 0) -> Backbone:
    return build_backbone("shape3d", ImageShape(1, (16, 16, 16)), seed=seed)


def test_statistics_tell_size_and_thickness_but_not_orientation() -> None:
    slab = torch.zeros(1, 1, 16, 16, 16)
    slab[:, :, 7:9, 2:14, 4:12] = 1
    volumes = torch.cat([balls([3.0, 5.0]), slab, slab.transpose(2, 4), slab.flip(3)])
    found = shape_statistics(volumes)
    assert found.shape == (5, 6)
    size, thickness = found[:, 0], found[:, 2]
    assert size[0] < size[1]
    assert thickness[2] < thickness[1]
    torch.testing.assert_close(found[2], found[3], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[2], found[4], atol=1e-3, rtol=0)
    assert found.mean(dim=0).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):  # as training on a GPU computes
        assert torch.equal(shape_statistics(volumes), found)


def test_spreads_are_those_of_the_voxels() -> None:
    from cdt_train.views import _covariance

    slab = torch.zeros(1, 16, 16, 16)
    slab[:, 7:9, 2:14, 4:12] = 1
    places = slab[0].nonzero().float()
    expected = torch.cov(places.T, correction=0)
    torch.testing.assert_close(
        _covariance(slab, slab.sum(dim=(1, 2, 3)))[0], expected, atol=1e-3, rtol=0
    )


def test_pretraining_learns_and_is_taken_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = (255 * balls([2 + 0.3 * step for step in range(16)])).to(torch.uint8)
    settings = Pretraining(epochs=3, batch_size=8)
    options = {"folder": tmp_path, "config": {"source": {"x": 1}}, "engine": engine()}
    weights = pretrain_views(images, backbone(), settings, **options)  # type: ignore[arg-type]
    start = backbone().net.state_dict()
    assert weights.keys() == start.keys()
    assert not torch.equal(weights["stem.0.weight"], start["stem.0.weight"])
    capsys.readouterr()
    again = pretrain_views(images, backbone(9), settings, **options)  # type: ignore[arg-type]
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert "pretraining: taken up from" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"trained with pretraining\.epochs=3, now 4: resume"):
        pretrain_views(images, backbone(), Pretraining(4, 8), **options)  # type: ignore[arg-type]


def test_one_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="pretraining: 1 training images: at least 2 are"):
        pretrain_views(
            balls([3.0]), backbone(), Pretraining(), folder=tmp_path, config={}, engine=engine()
        )


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16, 16)])
def test_tiles_and_volumes_that_are_images_are_contrasted_alone(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind = "conv2d" if len(shape) == 3 else "shape3d"
    made = build_backbone(kind, ImageShape(shape[0], shape[1:]), seed=0)
    pretrain_views(
        torch.rand(8, *shape), made, Pretraining(1, 4), folder=tmp_path, config={}, engine=engine()
    )
    content = torch.load(tmp_path / "ssl_epoch_0001.pt", weights_only=True)
    assert set(content["history"][0]) >= {"loss", "contrast", "accuracy", "score"}
    assert "shape" not in content["history"][0]
