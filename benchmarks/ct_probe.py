"""Does the CT encoder know where it is? A linear probe of regions, across patients."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cdt_train.checkpoint import load_checkpoint, load_weights
from cdt_train.config import Recipe, recipe_from
from cdt_train.cubes import cut_cube, windowed
from cdt_train.encoders.conv3d import CtEncoder

INDEX = "lidc_patch32_index.csv"
BATCH = 32
Floats = NDArray[np.float32]


def probe(checkpoint: Path, ct: Path, seed: int) -> dict[str, float]:
    """Fit a linear classifier of regions to one patient's cubes and test it on the other's.

    Args:
        checkpoint: `ct_encoder_pretrained.pt` of phase 1.
        ct: the folder with the volumes and the index of labelled places.
        seed: of the untrained encoder.

    Returns:
        Mean accuracy both ways of the pretrained encoder, of an untrained one with the same
        architecture, and of histograms of the HU.
    """
    content = load_checkpoint(checkpoint, ("model_state_dict", "config"))
    recipe = recipe_from(content["config"])
    torch.manual_seed(seed)
    untrained = _encoder(recipe)
    pretrained = _encoder(recipe)
    load_weights(pretrained, content["model_state_dict"], checkpoint)
    cubes, labels, patients = _places(ct)
    features = {
        "pretrained": _features(pretrained, cubes, recipe),
        "untrained": _features(untrained, cubes, recipe),
        "hu_histogram": np.stack([_histogram(cube) for cube in cubes]),
    }
    return {name: _both_ways(found, labels, patients) for name, found in features.items()}


def _encoder(recipe: Recipe) -> CtEncoder:
    model, windows = recipe.model, len(recipe.data.hu_windows)
    return CtEncoder(windows, model.ct_widths, model.feature_dim).eval()


def _places(ct: Path) -> tuple[list[Any], NDArray[Any], NDArray[Any]]:
    with (ct / INDEX).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    files = sorted({row["volume"] for row in rows})
    volumes = {name: torch.from_numpy(np.load(ct / name)["hu"]) for name in files}
    centres = [np.array([int(row[axis]) for axis in "zyx"]) for row in rows]
    cubes = [cut_cube(volumes[row["volume"]], c) for row, c in zip(rows, centres, strict=True)]
    labels, patients = (np.array([row[name] for row in rows]) for name in ("label", "volume"))
    return cubes, labels, patients


@torch.no_grad()
def _features(encoder: CtEncoder, cubes: list[Any], recipe: Recipe) -> Floats:
    whole = torch.stack(cubes)[:, None].float()
    parts = [
        encoder(windowed(part, recipe.data.hu_windows)).mean(dim=1)
        for part in torch.split(whole, BATCH)
    ]
    found: Floats = torch.cat(parts).numpy()
    return found


def _histogram(cube: Any) -> NDArray[Any]:
    counts, _ = np.histogram(cube.numpy().clip(-1024, 1023), bins=64, range=(-1024, 1024))
    return np.sqrt(counts / counts.sum())


def _both_ways(features: Floats, labels: NDArray[Any], patients: NDArray[Any]) -> float:
    scores = []
    for known in np.unique(patients):
        fitted, tested = patients == known, patients != known
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(features[fitted], labels[fitted])
        scores.append(probe.score(features[tested], labels[tested]))
    return float(np.mean(scores))
