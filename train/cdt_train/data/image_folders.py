"""The layout `image_folders`: one folder a class, with or without splits.

    ROOT/CLASS/*.jpeg                    folds are made
    ROOT/train/CLASS/*.jpeg              with val/ (or valid/, validation/) and test/ beside it

In a class folder, sub-folders are patients: `CLASS/PATIENT/*.jpeg`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.assemble import assemble
from cdt_train.data.class_folders import class_tiles, grouping_of, looks_like_a_patient
from cdt_train.data.csv_folds import BY_FOLD, FOLD_NAMES
from cdt_train.data.csv_rows import BY_TILE
from cdt_train.data.dataset import LabelledTile, TileDataset
from cdt_train.data.regions import TILE_SUFFIXES, subfolders


def read_image_folders(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """Lists the tiles of class folders, sorted by split and path.

    Args:
        data_dir: `ROOT`.
        ct_dir: Where CT series lie, if any.

    Raises:
        DatasetError: there are no class folders, one is empty, they are named as patients are,
            or a split has a class that train lacks.
    """
    if not data_dir.is_dir():
        raise DatasetError(f"{data_dir} is not a folder: CLASS/ or train/CLASS/ is expected there")
    warnings: list[str] = []
    splits = _splits(data_dir, warnings)
    if splits:
        tiles = [
            replace(tile, split=side if len(splits) > 1 else None)
            for side, folder in splits.items()
            for tile in _tiles(folder, data_dir)
        ]
    else:
        tiles = _tiles(data_dir, data_dir)
    by = grouping_of(tiles)
    if by == "tile":
        warnings.append((BY_FOLD if len(splits) > 1 else BY_TILE).format(source=data_dir))
    return assemble(tiles, by, warnings, source=data_dir, ct_dir=ct_dir)


def _splits(root: Path, warnings: list[str]) -> dict[str, Path]:
    """The folders of train, val and test, in that order; none where the folders are classes."""
    found: dict[str, Path] = {}
    others = []
    for folder in subfolders(root):
        side = FOLD_NAMES.get(folder.name.lower())
        if side is None:
            others.append(folder)
        elif side in found:
            raise DatasetError(
                f"{root} has both {found[side].name}/ and {folder.name}/: keep one {side} split"
            )
        else:
            found[side] = folder
    if found and "train" not in found:
        raise DatasetError(f"{root} has {next(iter(found.values())).name}/ but no train/: add it")
    if found:
        warnings += [f"{folder} is no split and is left out" for folder in others]
    return {side: found[side] for side in ("train", "val", "test") if side in found}


def _tiles(top: Path, root: Path) -> list[LabelledTile]:
    """The tiles of every class folder in `top`."""
    folders = subfolders(top)
    if not folders:
        raise DatasetError(f"{top} has no class folders: expected {top.name}/CLASS/*.jpeg")
    if all(looks_like_a_patient(folder.name) for folder in folders):
        raise DatasetError(
            f"{top} has folders such as '{folders[0].name}', which look like patients, not "
            "classes: sort the tiles into CLASS/PATIENT/, or write a CSV and use data.layout=csv"
        )
    tiles = []
    for folder in folders:
        found = class_tiles(folder, root)
        if not found:
            suffixes = ", ".join(sorted(TILE_SUFFIXES))
            raise DatasetError(
                f"{folder}: the class has no image (expected {suffixes}): add images, or remove "
                "the folder"
            )
        tiles += found
    return tiles
