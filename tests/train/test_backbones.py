from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdt_runtime.errors import CheckpointError, MissingDependencyError, RecipeError
from cdt_train.encoders.backbones import (
    BACKBONES,
    LIBRARIES,
    Backbone,
    ImageShape,
    build_backbone,
    count_tokens,
)
from cdt_train.encoders.weights import load_backbone_weights, permuted, read_weights

TILE, VOLUME = ImageShape(3, (64, 64)), ImageShape(1, (32, 32, 32))
OWN = [("conv2d", TILE), ("conv3d", VOLUME), ("shape3d", VOLUME)]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_own_backbones_are_all_tested() -> None:
    assert {name for name, _ in OWN} == set(BACKBONES) - LIBRARIES


@pytest.mark.parametrize(("name", "shape"), OWN)
def test_a_backbone_gives_tokens_and_the_seed_decides_its_weights(
    name: str, shape: ImageShape
) -> None:
    made, again, other = (build_backbone(name, shape, seed=seed) for seed in (1, 1, 2))
    images = torch.rand(2, shape.channels, *shape.sides)
    tokens = made.eval().tokens(images)
    assert tokens.shape == (2, count_tokens(made, shape), made.width)
    assert torch.equal(tokens, again.eval()(images))
    assert not torch.equal(tokens, other.eval()(images))


def test_shapes_of_nothing_and_of_noise_below_zero_have_finite_tokens() -> None:
    made = build_backbone("shape3d", VOLUME, seed=0).eval()
    for images in (torch.zeros(1, 1, 32, 32, 32), -torch.rand(1, 1, 32, 32, 32)):
        assert made.tokens(images).abs().max() < 100


def test_images_are_standardised_before_the_network() -> None:
    made = Backbone(nn.Flatten(2), 4, mean=(0.5, 0.25), std=(0.5, 0.25))
    images = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 0.5)])[None]
    assert made.tokens(images).tolist() == [[[1.0] * 4, [1.0] * 4]]


@pytest.mark.parametrize("name", ["resnet18", "conv2d:x", "timm", "timm:", ""])
def test_an_unknown_backbone_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"backbone '{name}': unknown; the backbones are .*conv"):
        build_backbone(name, TILE, seed=0)


def test_tiles_and_volumes_are_not_mixed_up() -> None:
    message = "backbone shape3d: takes 3D images, and the data are 2D: conv2d or timm:NAME fits"
    with pytest.raises(RecipeError, match=message):
        build_backbone("shape3d", TILE, seed=0)
    message = "backbone conv2d: takes 2D images, and the data are 3D: shape3d or conv3d fits"
    with pytest.raises(RecipeError, match=message):
        build_backbone("conv2d", VOLUME, seed=0)


def test_images_too_small_are_refused_in_one_line() -> None:
    small = ImageShape(1, (4, 4, 4))
    with pytest.raises(
        RecipeError, match=r"can't take images of 1 x 4 x 4 x 4: .*: give another --image-size"
    ) as caught:
        count_tokens(build_backbone("conv3d", small, seed=0), small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_missing_library_is_named_with_its_cure(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    shape = VOLUME if library == "monai" else TILE
    with pytest.raises(
        MissingDependencyError,
        match=rf"^backbone {library}: {library} is not installed: pip install {library}$",
    ):
        build_backbone(f"{library}:x", shape, seed=0)


def test_a_library_that_lacks_something_itself_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ImportError("tokenizers>=0.22 is required\nTry another")

    monkeypatch.setattr("importlib.import_module", import_module)
    message = r"timm can't be imported \(tokenizers>=0\.22 is required\): pip install timm$"
    with pytest.raises(MissingDependencyError, match=message):
        build_backbone("timm:x", TILE, seed=0)


class FakeTimmNet(nn.Module):
    """Stands for a model of timm, which is not part of the test environment."""

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.conv, self.num_features, self._last = nn.Conv2d(channels, 5, 8, 8), 5, last
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}

    def forward_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images)
        return features.permute(0, 2, 3, 1) if self._last else features


@pytest.mark.parametrize("last", [False, True])
def test_feature_maps_of_either_order_become_tokens(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> FakeTimmNet:
        asked.append({"name": name} | options)
        return FakeTimmNet(options["in_chans"], last)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    made = build_backbone("timm:some_net", TILE, seed=0)
    assert asked == [{"name": "some_net", "pretrained": False, "num_classes": 0, "in_chans": 3}]
    images = torch.rand(2, 3, 64, 64)
    plain = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    net: Any = made.net
    expected = net.net.conv(plain).flatten(2).transpose(1, 2)
    torch.testing.assert_close(made.tokens(images), expected)


def test_a_name_that_timm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, **_: Any) -> None:
        raise RuntimeError(f"Unknown model ({name})")

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    with pytest.raises(RecipeError, match=r"^backbone timm:nonsense: timm knows no such model$"):
        build_backbone("timm:nonsense", TILE, seed=0)


def test_a_transformers_backbone_comes_from_a_folder_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(folder: Path, **options: Any) -> Any:
        assert options["local_files_only"]
        assert options["use_safetensors"]
        return nn.Identity(), {"missing_keys": ["b.weight", "a.weight"]}

    fake = SimpleNamespace(AutoModel=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(CheckpointError, match=r"no config\.json there: .* nothing is downloaded"):
        build_backbone(f"transformers:{tmp_path}/none", TILE, seed=0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors, first a\.weight, b\.weight$"):
        build_backbone(f"transformers:{tmp_path}", TILE, seed=0)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.net.", "a.b.c."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict"])
def test_weights_load_from_the_usual_files(
    prefix: str, container: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin, net, path = tiny(), tiny(), tmp_path / "weights.pt"
    torch.nn.init.normal_(net[0].weight)  # type: ignore[index]
    state = {prefix + key: value for key, value in origin.state_dict().items()}
    state["head.weight"] = torch.zeros(2)
    torch.save({container: state} if container else state, path)
    load_backbone_weights(net, read_weights(path), "weights.pt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), origin.state_dict().values(), strict=True)
    )
    said = "weights.pt: 1 tensors left out that the backbone lacks"
    assert said in capsys.readouterr().err


def test_weights_load_from_safetensors(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == state.keys()


def test_a_tensor_that_the_file_lacks_is_named() -> None:
    state = tiny().state_dict()
    del state["0.bias"], state["1.weight"]
    with pytest.raises(
        CheckpointError,
        match=r"^x\.pt: lacks 2 of 7 tensors of the backbone, first 0\.bias, 1\.weight: give",
    ):
        load_backbone_weights(tiny(), state, "x.pt")


def test_a_tensor_of_another_shape_is_named() -> None:
    state = tiny().state_dict() | {"1.weight": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"x: 1\.weight is \(9,\), the backbone has \(4,\)"):
        load_backbone_weights(tiny(), state, "x")


@pytest.mark.parametrize(("found", "own"), [(1, 3), (3, 1)])
def test_a_stem_is_adapted_only_if_asked_and_keeps_its_answer_to_gray(
    found: int, own: int, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    origin, net = nn.Sequential(nn.Conv2d(found, 4, 3)), nn.Sequential(nn.Conv2d(own, 4, 3))
    message = rf"w: 0\.weight takes {found} channels, the images have {own}: --adapt-stem sums"
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(net, origin.state_dict(), "w")
    load_backbone_weights(net, origin.state_dict(), "w", adapt_stem=True)
    said = f"w: 0.weight changed from {found} to {own} input channels"
    assert said in capsys.readouterr().err
    gray = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(
        net(gray.expand(-1, own, -1, -1)), origin(gray.expand(-1, found, -1, -1))
    )


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such weights file: --weights takes"):
        read_weights(tmp_path / "none.pt")
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match=rf"{name}: not readable as weights: expected"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"empty\.pt: holds no tensors by name"):
        read_weights(tmp_path / "empty.pt")


def test_permuted_weights_keep_their_values_and_lose_their_places() -> None:
    state = tiny().state_dict()
    first, again, other = (permuted(state, seed) for seed in (1, 1, 2))
    weight = state["0.weight"]
    assert torch.equal(first["0.weight"].flatten().sort().values, weight.flatten().sort().values)
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], weight)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert first["1.num_batches_tracked"] == state["1.num_batches_tracked"]
