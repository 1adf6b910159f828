from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cdt_export.inputs import open_data, read_tiles
from cdt_export.parity import TOLERANCES, HeldOut
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import BundleError
from cdt_runtime.prototypes import softmax
from cdt_train.embed import embed_tiles
from cdt_train.episodes import Episode, EpisodeSampler
from cdt_train.evaluate import draw_episodes, embed_with_bundle, metrics, score_episodes
from cdt_train.trained import Trained, load_trained


@pytest.fixture(scope="module")
def trained(trained_dir: Path) -> Trained:
    return load_trained(trained_dir / "best_model.pt")


@pytest.fixture(scope="module")
def held_out(trained: Trained) -> HeldOut:
    return read_tiles(open_data(trained, None))[1]


@pytest.fixture(scope="module")
def episodes(held_out: HeldOut) -> list[Episode]:
    labels = held_out.labels
    sampler = EpisodeSampler(
        labels, np.arange(len(labels)), ("a", "b"), n_way=None, k_shot=2, n_query=4
    )
    return draw_episodes(sampler, 50, [0])


@pytest.mark.parametrize("fit", ["mean", "ridge"])
@pytest.mark.parametrize("with_ct", [True, False])
def test_the_table_of_the_bundle_is_that_of_the_model(
    trained: Trained,
    held_out: HeldOut,
    episodes: list[Episode],
    bundle_dir: Path,
    with_ct: bool,
    fit: str,
) -> None:
    ct = held_out.ct if with_ct else None
    ours = embed_tiles(trained.model, held_out.tiles, ct, torch.device("cpu"))
    array = None if ct is None else ct.numpy()
    shipped = embed_with_bundle(bundle_dir, held_out.tiles.numpy(), array)
    assert np.allclose(shipped, ours, atol=1e-4)
    expected, found = (score_episodes(e, episodes, trained.scale, fit) for e in (ours, shipped))
    assert np.array_equal(found.accuracies, expected.accuracies)
    gap = np.abs(softmax(found.logits) - softmax(expected.logits)).max()
    assert gap < TOLERANCES["fp32"].probability
    table, reference = metrics(found), metrics(expected)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "cohen_kappa", "mcc", "confusion"):
        assert table[name] == reference[name]
    assert table["nll"] == pytest.approx(reference["nll"], abs=1e-3)


def test_it_embeds_as_the_classifier_does(
    bundle_dir: Path, cache_dir: Path, phantom_dir: Path
) -> None:
    classifier = FewShotClassifier.open(bundle_dir, backend="onnxruntime")
    files = sorted((phantom_dir / "new_patient").glob("*.tif"))
    tiles = np.stack([classifier.read(file).array for file in files])
    tiles = np.concatenate([tiles] * 7)[:37]  # more than one batch
    found = embed_with_bundle(bundle_dir, tiles, None)
    assert found.shape == (37, 32)
    assert np.allclose(found[: len(files)], classifier.embed(files), atol=1e-6)


def test_what_the_graphs_do_not_take_is_refused_in_words(
    bundle_dir: Path, held_out: HeldOut
) -> None:
    tiles = held_out.tiles[:2].numpy()
    with pytest.raises(BundleError, match=r"tiny: takes tiles of \(6, 64, 64\) \w+, found"):
        embed_with_bundle(bundle_dir, tiles[:, :3], None)
    with pytest.raises(BundleError, match="float64: preprocess them as the bundle does"):
        embed_with_bundle(bundle_dir, tiles.astype(np.float64), None)
    with pytest.raises(BundleError, match=r"takes a CT of \(1, 1, 8, 64, 64\), found \(1, 4\)"):
        embed_with_bundle(bundle_dir, tiles, np.zeros((1, 4), np.float32))
    with pytest.raises(BundleError, match="tiny: no tile to embed: give at least one"):
        embed_with_bundle(bundle_dir, tiles[:0], None)
