"""The layout `medmnist`: one npz file in the format of MedMNIST.

    train_images  val_images  test_images    (n, H, W), (n, H, W, 3) or (n, D, H, W[, C])
    train_labels  val_labels  test_labels    (n, 1); or (n, L) of 0 and 1: several labels an image
    label_names                              optional text; else the classes are called 0, 1, ...

All but train may be missing. Images are uint8, int16 or float32.

Source: Yang et al. 2023 (MedMNIST v2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_runtime.printable import counted
from cdt_train.data.assemble import SIDES, assemble, require_classes
from cdt_train.data.csv_folds import BY_FOLD
from cdt_train.data.csv_rows import BY_TILE
from cdt_train.data.dataset import LabelledTile, TileDataset
from cdt_train.data.npz import (
    Header,
    pixels_hash,
    read_arrays,
    read_headers,
    require_array,
    require_dtype,
    require_finite,
)

IMAGE_DTYPES = ("uint8", "int16", "float32")


@dataclass(frozen=True, eq=False)
class Medmnist:
    """What a file holds.

    Attributes:
        path: The file.
        images: For each split, `(n, H, W, C)` or `(n, D, H, W, C)`.
        labels: For each split, `(n,)` class numbers, or `(n, L)` of 0 and 1.
        classes: Their names.
        first_twin: For each image of a split, the index of the first that is the same: its own,
            or an earlier one.
    """

    path: Path
    images: Mapping[str, NDArray[Any]]
    labels: Mapping[str, NDArray[np.int64]]
    classes: tuple[str, ...]
    first_twin: Mapping[str, tuple[int, ...]]

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels["train"].ndim == 2

    @property
    def warnings(self) -> list[str]:
        """What the format can't tell."""
        text = BY_FOLD if len(self.images) > 1 else BY_TILE
        copies = sum(i != twin for part in self.first_twin.values() for i, twin in enumerate(part))
        note = f"{self.path}: {counted(copies, 'image')} the same as an earlier one: kept together"
        return [text.format(source=self.path), *([note] if copies else [])]


def read_medmnist(data_dir: Path, ct_dir: Path | None = None) -> TileDataset:
    """Lists the images of a file, split by split.

    Args:
        data_dir: The npz file, or a folder that holds one.
        ct_dir: Where CT series lie, if any.

    Raises:
        DatasetError: the file can't be used, or its images have several labels each.
    """
    found = load_medmnist(data_dir)
    if found.multilabel:
        raise DatasetError(
            f"{found.path}: an image has {len(found.classes)} labels of 0 or 1 each, and few-shot "
            "episodes take one class a tile: train a supervised model on it"
        )
    tiles = [
        LabelledTile(
            path=found.path,
            label=found.classes[label],
            patient=f"{side}_images[{found.first_twin[side][index]}]",
            split=side if len(found.images) > 1 else None,
            pixels=found.images[side][index],
            name=f"{side}_images[{index}]",
        )
        for side, labels in found.labels.items()
        for index, label in enumerate(labels.tolist())
    ]
    return assemble(
        tiles, "tile", found.warnings, source=found.path, ct_dir=ct_dir, classes=found.classes
    )


def load_medmnist(data_dir: Path) -> Medmnist:
    """Reads a file, one label an image or several.

    Raises:
        DatasetError: the file can't be used; the message names the array and its index.
    """
    path = _file(data_dir)
    headers = read_headers(path)
    sides = [
        side
        for side in SIDES
        if side == "train" or {f"{side}_images", f"{side}_labels"} & set(headers)
    ]
    for side in sides:
        _check_headers(path, headers, side)
    names = [f"{side}_{what}" for side in sides for what in ("images", "labels")]
    arrays = read_arrays(path, [*names, *(["label_names"] if "label_names" in headers else [])])
    images = {side: _with_channels(arrays[f"{side}_images"]) for side in sides}
    for side in sides:
        require_finite(path, f"{side}_images", images[side])
    labels = {side: _labels(arrays[f"{side}_labels"]) for side in sides}
    classes = _classes(path, labels, arrays.get("label_names"))
    _check_labels(path, labels, classes)
    return Medmnist(path, images, labels, classes, _twins(path, images, labels))


def _twins(
    path: Path, images: Mapping[str, NDArray[Any]], labels: Mapping[str, NDArray[np.int64]]
) -> dict[str, tuple[int, ...]]:
    """The first of each set of images that are the same.

    Raises:
        DatasetError: two of them are in two splits, or have other labels.
    """
    first: dict[str, tuple[str, int]] = {}
    twins: dict[str, tuple[int, ...]] = {}
    for side, part in images.items():
        own = []
        for index, image in enumerate(part):
            its_side, its_index = first.setdefault(pixels_hash(image), (side, index))
            same_label = np.array_equal(labels[side][index], labels[its_side][its_index])
            if its_side != side or not same_label:
                raise DatasetError(
                    f"{path}: {side}_images[{index}] and {its_side}_images[{its_index}] are the "
                    "same image in two splits, or under two labels: keep one"
                )
            own.append(its_index)
        twins[side] = tuple(own)
    return twins


def _file(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        return data_dir
    found = sorted(path for path in data_dir.glob("*.npz") if not path.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:10]) or "none"
        raise DatasetError(f"{data_dir}: expected one npz file, found {names}: give its path")
    return found[0]


def _check_headers(path: Path, headers: Mapping[str, Header], side: str) -> None:
    """Shapes and dtypes of one split, and that they agree with those of train."""
    images = require_array(path, headers, f"{side}_images")
    labels = require_array(path, headers, f"{side}_labels")
    require_dtype(path, f"{side}_images", images, IMAGE_DTYPES)
    if not 3 <= len(images.shape) <= 5 or 0 in images.shape:
        raise DatasetError(
            f"{path}: array '{side}_images' has the shape {images.shape}, expected (n, H, W), "
            "(n, H, W, 3) or (n, D, H, W[, C]) with at least one image"
        )
    if labels.dtype.kind not in "bui" or not 1 <= len(labels.shape) <= 2:
        raise DatasetError(
            f"{path}: array '{side}_labels' is {labels.dtype.name} of shape {labels.shape}, "
            "expected whole numbers (n, 1) or (n, L)"
        )
    if labels.shape[0] != images.shape[0]:
        raise DatasetError(
            f"{path}: {images.shape[0]} {side}_images but {labels.shape[0]} {side}_labels: they "
            "must be as many"
        )
    first = (headers["train_images"], headers["train_labels"])
    for what, mine, its in (("images", images, first[0]), ("labels", labels, first[1])):
        if mine.shape[1:] != its.shape[1:] or (what == "images" and mine.dtype != its.dtype):
            raise DatasetError(
                f"{path}: {side}_{what} are {mine.dtype.name} of shape {mine.shape[1:]} each, "
                f"train_{what} {its.dtype.name} of {its.shape[1:]}: they must be alike"
            )


def _with_channels(images: NDArray[Any]) -> NDArray[Any]:
    """The images with a channel axis, in the machine's byte order.

    Four axes are `(n, H, W, C)` where the last has 1 or 3, as a volume is not 3 voxels wide.
    """
    has_channels = images.ndim == 5 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    native = images.astype(images.dtype.newbyteorder("="), copy=False)
    return native if has_channels else native[..., None]


def _labels(labels: NDArray[Any]) -> NDArray[np.int64]:
    single = labels.ndim == 2 and labels.shape[1] == 1
    numbers: NDArray[np.int64] = (labels[:, 0] if single else labels).astype(np.int64)
    return numbers


def _classes(
    path: Path, labels: Mapping[str, NDArray[np.int64]], names: NDArray[Any] | None
) -> tuple[str, ...]:
    several = labels["train"].ndim == 2
    highest = max(int(part.max()) for part in labels.values())
    count = labels["train"].shape[1] if several else highest + 1
    if names is None:
        n_images = sum(map(len, labels.values()))
        if not several and count > n_images:
            raise DatasetError(
                f"{path}: labels run up to {highest} for {n_images} images: number the classes "
                "from 0"
            )
        return tuple(str(number) for number in range(count))
    written = _class_names(path, names)
    if several and len(written) != count:
        raise DatasetError(
            f"{path}: {len(written)} label_names for {count} labels an image: they must be as many"
        )
    return written


def _class_names(path: Path, names: NDArray[Any]) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DatasetError(
            f"{path}: array 'label_names' is {names.dtype.name} of shape "
            f"{names.shape}, expected text, one name a class"
        )
    written = tuple(
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in names.tolist()
    )
    if len(set(written)) != len(written) or not all(n.strip() and n.isprintable() for n in written):
        raise DatasetError(f"{path}: array 'label_names' has an empty name, or one twice")
    return written


def _check_labels(
    path: Path, labels: Mapping[str, NDArray[np.int64]], classes: tuple[str, ...]
) -> None:
    require_classes(classes, path)
    several = labels["train"].ndim == 2
    top = 1 if several else len(classes) - 1
    for side, part in labels.items():
        wrong = np.argwhere((part < 0) | (part > top))
        if len(wrong):
            place = tuple(int(at) for at in wrong[0])
            raise DatasetError(
                f"{path}: {side}_labels{list(place)} is {part[place]}, expected 0 to {top}"
            )
    train = labels["train"]
    seen = train.sum(axis=0) if several else np.bincount(train, minlength=len(classes))
    empty = [name for name, count in zip(classes, seen.tolist(), strict=True) if not count]
    if empty:
        raise DatasetError(
            f"{path}: class '{empty[0]}' has no image in train_images: add some, or leave the "
            "class out and number the others from 0"
        )
