"""The pictures of one fold: curves, decisions, embeddings, attention, alignment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cdt_train.embed import Floats, tile_tokens
from cdt_train.metrics import curves
from cdt_train.models.transfer_model import TransferModel
from cdt_train.pictures import (
    plot_ct_attention,
    plot_embeddings,
    plot_tile_attention,
    tile_image,
)
from cdt_train.plots import (
    plot_confusion,
    plot_curves,
    plot_reliability,
    plot_risk_coverage,
    plot_roc,
)
from cdt_train.rows import ROWS
from cdt_train.split import Fold

if TYPE_CHECKING:
    from cdt_train.fold import Tested

VIEW_PANELS = {"view_contrast": "contrastive loss", "view_accuracy": "accuracy of matching views"}
TILE_PANELS = {
    "loss": "loss",
    "val_loss": "loss",
    "accuracy": "accuracy",
    "val_accuracy": "accuracy",
}
EPISODE_PANELS = {
    "episode_loss": "loss of episodes",
    "val_loss": "loss of episodes",
    "accuracy": "accuracy of episodes",
    "val_accuracy": "accuracy of episodes",
    "domain_accuracy": "accuracy of the domain discriminator",
    "gate": "gate of the bridge",
}

CAPTIONS = {
    "curves_views.png": "Phase 2: the tile encoder, by views of tiles",
    "curves_tiles.png": "Phase 2: the tile encoder, by classes",
    "curves.png": "Phase 3: episodes",
    "confusion.png": "Confusion of classes",
    "roc.png": "ROC, each class against the rest",
    "reliability.png": "Reliability before and after calibration",
    "risk_coverage.png": "Errors among the answers that are given",
    "embeddings.png": "Test tiles without CT and with CT",
    "alignment.png": "Pooled tile and CT features where they meet, before and after phase 3",
    "attention_tiles.png": "Where in the tile the bridge looks at the CT",
    "attention_ct.png": "Where in the CT a tile looks",
}
"""Pictures of a fold, in the order of the report."""

SHOWN_TILES = 4
MOST_MAPPED = 400


def draw_fold(
    fold: Fold,
    result: Mapping[str, Any],
    tested: Tested,
    model: TransferModel,
    before: TransferModel,
    device: torch.device,
) -> None:
    """Draw every picture of a fold into its folder.

    Args:
        fold: its data.
        result: what `fold_N/metrics.json` will hold.
        tested: scores and embeddings of the test side.
        model: as it was kept.
        before: as it was before phase 3.
        device: where both live.
    """
    title = f"Fold {fold.number}"
    history = result["history"]
    for part, panels in {"views": VIEW_PANELS, "tiles": TILE_PANELS}.items():
        if history[part]:
            path = fold.folder / f"curves_{part}.png"
            plot_curves(path, f"{title}: tile encoder, {part}", history[part], panels)
    plot_curves(
        fold.folder / "curves.png",
        f"{title}: episodes",
        history["episodes"],
        EPISODE_PANELS,
        result["validation"]["epoch"],
    )
    _draw_decisions(fold, result, tested)
    _draw_embeddings(fold, tested)
    if len(fold.ct):
        _draw_bridge(fold, model, before, device)


def fold_captions(folder: Path) -> dict[str, Path]:
    """Return the pictures that a fold's folder holds, by caption."""
    found = {caption: folder / name for name, caption in CAPTIONS.items()}
    return {caption: path for caption, path in found.items() if path.is_file()}


def _draw_decisions(fold: Fold, result: Mapping[str, Any], tested: Tested) -> None:
    calibration, classes = result["calibration"], fold.test.classes
    k = calibration["k_shot"]
    heat = calibration["temperatures_with_ct"][str(k)]
    row = "with_ct" if "with_ct" in tested.scores else "without_ct"
    scores = tested.scores[row][k]
    drawn, raw = curves(scores, heat), curves(scores)
    title = f"Fold {fold.number}, {k}-shot, {ROWS[row]}"
    confusion = np.array(result["test"][row][str(k)]["confusion"])
    plot_confusion(fold.folder / "confusion.png", title, confusion, classes)
    plot_roc(fold.folder / "roc.png", title, drawn["roc"], classes)
    plot_reliability(
        fold.folder / "reliability.png",
        title,
        {"before": raw["reliability"], "after": drawn["reliability"]},
    )
    shown = ("with_ct", "without_ct", "protonet", "colour_statistics")
    plot_risk_coverage(
        fold.folder / "risk_coverage.png",
        f"Fold {fold.number}, {k}-shot",
        {
            ROWS[name]: curves(tested.scores[name][k])["risk_coverage"]
            for name in shown
            if name in tested.scores
        },
    )


def _draw_embeddings(fold: Fold, tested: Tested) -> None:
    panels = {
        ROWS[name]: tested.embedded[name][0]
        for name in ("without_ct", "with_ct")
        if name in tested.embedded
    }
    plot_embeddings(
        fold.folder / "embeddings.png",
        f"Fold {fold.number}: test tiles",
        panels,
        fold.test.labels,
        fold.test.classes,
        joint=True,
    )


@torch.no_grad()
def _draw_bridge(
    fold: Fold, model: TransferModel, before: TransferModel, device: torch.device
) -> None:
    _draw_alignment(fold, model, before, device)
    ct = fold.ct.volumes[:1].to(device)
    tiles = fold.test.take(_one_of_each(fold.test.labels))
    model.eval()
    ct_tokens, _ = model.context(ct)
    tokens = tile_tokens(model, tiles.tiles, device)
    weights = model.bridge.attention(tokens, ct_tokens).mean(dim=1)
    looks = weights[:, :, :-1].cpu().numpy()  # (B, N, T)
    side = round((looks.shape[1] / model.path_encoder.scales) ** 0.5)
    by_tile = looks.sum(axis=2).reshape(len(looks), -1, side, side).mean(axis=1)
    plot_tile_attention(
        fold.folder / "attention_tiles.png",
        f"Fold {fold.number}: weight on the CT, the rest looks away",
        [tile_image(tile) for tile in tiles.tiles.numpy()],
        list(by_tile),
        [tiles.classes[label] for label in tiles.labels],
    )
    volume = ct[0, 0].cpu().numpy()
    grid = (volume.shape[0] // 8, volume.shape[1] // 32, volume.shape[2] // 32)
    by_token = looks.mean(axis=(0, 1)).reshape(model.ct_encoder.scales, *grid).mean(axis=0)
    plot_ct_attention(
        fold.folder / "attention_ct.png", f"Fold {fold.number}: CT of training", volume, by_token
    )


def _draw_alignment(
    fold: Fold, model: TransferModel, before: TransferModel, device: torch.device
) -> None:
    panels = {
        "before": _sides(before, fold, device),
        "after": _sides(model, fold, device),
    }
    count = len(panels["after"]) - len(fold.ct)
    domains = np.repeat([0, 1], [count, len(fold.ct)])
    plot_embeddings(
        fold.folder / "alignment.png",
        f"Fold {fold.number}: domains",
        panels,
        domains,
        ("tiles", "CT"),
        joint=False,
    )


def _sides(model: TransferModel, fold: Fold, device: torch.device) -> Floats:
    """Pool tiles, then CT, in the space where the bridge brings them together."""
    model.to(device).eval()
    some = np.linspace(0, len(fold.test) - 1, min(len(fold.test), MOST_MAPPED)).astype(np.int64)
    tokens = tile_tokens(model, fold.test.take(some).tiles, device)
    volumes = [model.context(volume.to(device))[0] for volume in torch.split(fold.ct.volumes, 1)]
    tiles, ct = model.bridge.projected(tokens, torch.cat(volumes))
    result: Floats = torch.cat([tiles.mean(dim=1), ct.mean(dim=1)]).cpu().numpy()
    return result


def _one_of_each(labels: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
    """Indices of a tile of each class, of at most `SHOWN_TILES` classes."""
    return np.array([np.flatnonzero(labels == c)[0] for c in np.unique(labels)[:SHOWN_TILES]])
