"""What all layouts check alike, when their tiles are listed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.ct_search import find_ct
from cdt_train.data.dataset import GroupedBy, LabelledTile, TileDataset

SIDES = ("train", "val", "test")


def assemble(
    tiles: Sequence[LabelledTile],
    grouped_by: GroupedBy,
    warnings: Iterable[str],
    *,
    source: Path,
    ct_dir: Path | None,
    classes: Sequence[str] = (),
) -> TileDataset:
    """Make a data set of listed tiles.

    Args:
        tiles: At least one.
        grouped_by: What their `patient` holds.
        warnings: Of the layout.
        source: What a message about all of them names: the CSV, folder or npz file.
        ct_dir: Where CT series lie, if any.
        classes: In the data set's own order; else sorted.

    Raises:
        DatasetError: there is one class only, a group is parted by folds, train lacks a class, or
            there is no CT in `ct_dir`.
    """
    classes = tuple(classes) or tuple(sorted({tile.label for tile in tiles}))
    require_classes(classes, source)
    _refuse_parted(tiles, grouped_by, source)
    _refuse_odd_splits(tiles, source)
    _refuse_untrained(tiles, source)
    ct, ct_warnings = find_ct(ct_dir) if ct_dir is not None else ([], [])
    notes = [*warnings, *look_alikes(classes), *ct_warnings]
    return TileDataset(tuple(tiles), tuple(ct), tuple(classes), grouped_by, tuple(notes))


def require_classes(classes: Sequence[str], source: Path) -> None:
    """Refuse a data set of one class.

    Raises:
        DatasetError: it is one.
    """
    if len(classes) < 2:
        raise DatasetError(f"{source} has one class only, '{classes[0]}': at least 2 are needed")


def look_alikes(classes: Sequence[str]) -> list[str]:
    """A slip of the keyboard makes a class of its own; only the user knows whether it is one."""
    spelling: dict[str, str] = {}
    warnings = []
    for label in classes:
        first = spelling.setdefault(" ".join(re.split(r"[\s_-]+", label.casefold())), label)
        if first != label:
            warnings.append(f"labels '{first}' and '{label}' are two classes: is that meant?")
    return warnings


def _refuse_parted(tiles: Sequence[LabelledTile], grouped_by: GroupedBy, source: Path) -> None:
    """One patient on both sides of a split makes every figure of it too good.

    This is an error, not a warning: nobody can tell afterwards how much of a result it was, and
    either cure is one column away.
    """
    first: dict[str, LabelledTile] = {}
    for tile in tiles:
        other = first.setdefault(tile.patient, tile)
        if other.split != tile.split:
            raise DatasetError(
                f"{source}: {grouped_by} '{tile.patient}' has tiles in the folds '{other.split}' "
                f"({other.name or other.path.name}) and '{tile.split}' "
                f"({tile.name or tile.path.name}): a {grouped_by} must not be parted: correct the "
                "folds, or leave them out and they are made by group"
            )


def _refuse_odd_splits(tiles: Sequence[LabelledTile], source: Path) -> None:
    counts = Counter(tile.split for tile in tiles)
    named = [side for side in SIDES if side in counts]
    numbers = sorted(str(split) for split in counts if split not in (*SIDES, None))
    if named and numbers:
        raise DatasetError(
            f"{source}: folds are both '{named[0]}' and '{numbers[0]}': use numbers, or train, "
            "val and test"
        )
    if len(numbers) == 1:
        raise DatasetError(
            f"{source}: every tile is in the fold '{numbers[0]}': at least 2 folds are needed; "
            "leave the column out and they are made by group"
        )
    if named and "train" not in named:
        raise DatasetError(f"{source}: no tile is in train, only in {' and '.join(named)}: add it")


def _refuse_untrained(tiles: Sequence[LabelledTile], source: Path) -> None:
    trained = {tile.label for tile in tiles if tile.split == "train"}
    for tile in tiles:
        if tile.split in SIDES and tile.label not in trained:
            raise DatasetError(
                f"{source}: class '{tile.label}' is in {tile.split} and not in train: add it there"
            )
