"""The layout `csv`: a CSV that names tiles, labels and, where they are known, folds and patients.

    path,label[,fold][,patient|group]

`image_path`, `patient_id`, `group_id` and `split` are other names of these columns; further columns
are not looked at. A path is absolute, or relative to the CSV. A fold is a number, each fold being
the test side once (BreakHis, HCRF), or train, val or test.
"""

from __future__ import annotations

from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_train.data.assemble import assemble
from cdt_train.data.csv_rows import (
    BY_TILE,
    Row,
    Seen,
    existing_tile,
    grouped_by,
    inside,
    missing_column,
    read_rows,
)
from cdt_train.data.dataset import LabelledTile, TileDataset, name_below

NAMES = ("labels.csv", "manifest.csv", "folds.csv")

FOLD_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""How data sets write the side of a split -> how we write it."""

OTHER_NAMES = {
    "image_path": "path",
    "patient_id": "patient",
    "group_id": "group",
    "split": "fold",
}

BY_FOLD = (
    "{source} names no patients: the same patient may stand on both sides of a fold, and results "
    "must not be called patient-level"
)


def read_csv(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """Lists the tiles that a CSV names, in its order.

    Args:
        data_dir: The CSV, or a folder that holds one of labels.csv, manifest.csv and folds.csv.
        ct_dir: Where CT series lie, if any.

    Raises:
        DatasetError: there is no such file or more than one, or a line can't be used.
    """
    csv_path = find_csv(data_dir)
    rows = read_rows(csv_path, _wrong_columns, OTHER_NAMES)
    by = grouped_by(rows[0])
    tiles, seen = [], Seen()
    for row in rows:
        path = _path(row, csv_path.parent)
        label = row.cell("label")
        seen.add(row, path, label)
        group = name_below(path, csv_path) if by == "tile" else row.cell(by)
        tiles.append(LabelledTile(path, label, group, split=fold_of(row)))
    warnings = []
    if by == "tile":
        text = BY_FOLD if tiles[0].split is not None else BY_TILE
        warnings.append(text.format(source=csv_path))
    return assemble(tiles, by, warnings, source=csv_path, ct_dir=ct_dir)


def find_csv(data_dir: Path) -> Path:
    """The CSV that a data folder holds, or that `data_dir` is.

    Raises:
        DatasetError: none, or more than one.
    """
    if not data_dir.is_dir():
        return data_dir
    found = [name for name in NAMES if (data_dir / name).is_file()]
    if len(found) > 1:
        raise DatasetError(
            f"{data_dir} holds {' and '.join(found)}: give the path of the one that holds"
        )
    if not found:
        others = sorted(path.name for path in data_dir.glob("*.csv"))
        listed = f"; give the path of one of {', '.join(others[:10])}" if others else ""
        raise DatasetError(f"{data_dir} holds none of {', '.join(NAMES)}{listed}")
    return data_dir / found[0]


def fold_of(row: Row) -> str | None:
    """The fold that a line gives its tile: a number without leading zeros, train, val or test.

    Raises:
        DatasetError: it is something else.
    """
    if "fold" not in row.cells:
        return None
    fold = row.cell("fold")
    if fold.isascii() and fold.isdigit():
        return str(int(fold))
    if fold.lower() not in FOLD_NAMES:
        raise DatasetError(
            f"{row.where}: fold is '{fold}', expected a whole number, or train, val or test"
        )
    return FOLD_NAMES[fold.lower()]


def _wrong_columns(columns: list[str]) -> str | None:
    return missing_column(
        columns,
        ("path", "label"),
        "'path,label' (with 'fold', and 'patient' or 'group', if known)",
    )


def _path(row: Row, root: Path) -> Path:
    written = Path(row.cell("path"))
    path = written if written.is_absolute() else inside(row, root, row.cell("path"))
    return existing_tile(row, path)
