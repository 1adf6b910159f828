"""A data folder, read: tiles and volumes in memory, and what is recorded of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdt_runtime.preprocess import Preprocess
from cdt_train.config import Recipe
from cdt_train.data import TileDataset, read_dataset
from cdt_train.data.arrays import (
    CtArrays,
    TileArrays,
    choose_preprocess,
    load_ct,
    load_tiles,
    survey_tiles,
)
from cdt_train.data.phantom import phantom_seed
from cdt_train.encoders.chosen import chosen_encoders, path_card
from cdt_train.progress import bar, say


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A data set in memory.

    Attributes:
        tiles: every tile.
        ct: every volume that can be used; there may be none.
        preprocess: how they were made.
        patients: names of the patients (or groups), by the number that `tiles.groups` gives them.
        info: `dataset_info` of a checkpoint.
    """

    tiles: TileArrays
    ct: CtArrays
    preprocess: Preprocess
    patients: tuple[str, ...]
    info: dict[str, Any]

    @property
    def paired(self) -> bool:
        """Whether some patient has both tiles and a CT."""
        return bool(set(self.ct.patients) & set(self.patients))


def read_data(recipe: Recipe, data_dir: Path, ct_dir: Path | None = None) -> LoadedData:
    """Read a data set in the recipe's layout.

    Args:
        recipe: of the run.
        data_dir: the data folder; for csv, medmnist and volumes_npz it may be the file itself.
        ct_dir: where CT series lie; for the hospital layout, in place of its own `ct_data`.

    Raises:
        RecipeError: no such layout.
        CdtError: the data can't be used.
    """
    dataset = read_dataset(recipe.data.layout, data_dir, ct_dir)
    survey = survey_tiles(dataset.tiles, recipe.data.image_size, data_dir, bar)
    preprocess = choose_preprocess(survey, recipe.data)
    encoders, own = chosen_encoders(recipe.model), path_card(recipe.model)
    tiles = load_tiles(dataset.tiles, dataset.classes, preprocess, data_dir, bar, encoders=encoders)
    ct, left_out = load_ct(dataset, preprocess, data_dir, bar, encoders)
    warnings = [*dataset.warnings, *_split_notes(dataset), *survey.warnings, *left_out]
    for warning in warnings:
        say(f"warning: {warning}")
    patients = tuple(sorted({tile.patient for tile in dataset.tiles}))
    info = _describe(dataset, data_dir, recipe, len(ct)) | {
        "ct_dir": str(ct_dir.resolve()) if ct_dir else None,
        "warnings": warnings,
        "fingerprint": _fingerprint(tiles, patients, ct),
        "encoders": [card.to_dict() for card in encoders.cards.values()],
        "path_encoder": own.to_dict() if own else None,
        "tile_facts": {
            name: [digest, tiles.classes[label]]
            for name, digest, label in zip(tiles.names, tiles.sha256, tiles.labels, strict=True)
        },
    }
    return LoadedData(tiles, ct, preprocess, patients, info)


def _split_notes(dataset: TileDataset) -> list[str]:
    """What results must say about a split that lacks a side."""
    if {tile.split for tile in dataset.tiles} != {"train", "val"}:
        return []
    return [
        "the data set has no test split: its val split is the test side, and validation tiles are "
        "drawn from train"
    ]


def _describe(
    dataset: TileDataset, data_dir: Path, recipe: Recipe, ct_count: int
) -> dict[str, Any]:
    seed = phantom_seed(data_dir)
    groups = {tile.patient for tile in dataset.tiles}
    kind = "patients" if dataset.grouped_by == "patient" else f"{dataset.grouped_by}s"
    counts = f"{len(dataset.tiles)} tiles of {len(groups)} {kind}, {ct_count} CT series"
    source = (
        f"{recipe.data.layout} layout"
        if seed is None
        else f"phantom data (generated with seed {seed}, no patients)"
    )
    return {
        "data": f"{source}: {counts}",
        "phantom": seed is not None,
        "layout": recipe.data.layout,
        "data_dir": str(data_dir.resolve()),
        "classes": list(dataset.classes),
        "grouped_by": dataset.grouped_by,
        "groups": len(groups),
        "tiles": len(dataset.tiles),
        "ct_series": ct_count,
        "seed": recipe.training.seed,
    }


def _fingerprint(tiles: TileArrays, patients: tuple[str, ...], ct: CtArrays) -> str:
    """Identity of the content, labels and groups: a run resumes on the same data or not at all."""
    groups = [patients[g] for g in tiles.groups]
    rows = sorted(zip(tiles.names, tiles.sha256, tiles.labels.tolist(), groups, strict=True))
    series = sorted(zip(ct.patients, ct.sha256, strict=True))
    splits = sorted(zip(tiles.names, tiles.split, strict=True)) if tiles.split else []
    content = [rows, series, *([splits] if splits else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
