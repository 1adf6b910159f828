"""A labelled data set as arrays, for supervised training: 2D or 3D, one label or several."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import DatasetError
from cdt_runtime.preprocess import area_resize
from cdt_train.config import DataRecipe
from cdt_train.data import TileDataset, read_dataset, require_layout
from cdt_train.data.arrays import choose_preprocess, load_tiles, survey_tiles
from cdt_train.data.dataset import tile_name
from cdt_train.data.medmnist import Medmnist, load_medmnist
from cdt_train.episodes import group_folds
from cdt_train.progress import bar

Task = Literal["binary", "multiclass", "multilabel"]


@dataclass(frozen=True, eq=False)
class LabelledArrays:
    """Images and their labels.

    Attributes:
        images: `(n, C, H, W)` or `(n, C, D, H, W)`, uint8, int16 or float32. Cubes of CT are int16
            HU.
        targets: `(n,)` int64, index into `classes`; or `(n, L)` float32 of 0 and 1.
        task: which of the two, and whether there are two classes.
        classes: their names.
        groups: `(n,)` int64; images of one patient (or group) share a number.
        split: `(n,)` text: "train", "val" or "test", or the number of a fold. All are "train" where
            the data set does not say.
        names: of each image, in messages and results.
        warnings: one line each.
        fingerprint: identity of all of it.
    """

    images: NDArray[Any]
    targets: NDArray[Any]
    task: Task
    classes: tuple[str, ...]
    groups: NDArray[np.int64]
    split: NDArray[np.str_]
    names: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: str

    @property
    def folds(self) -> tuple[str, ...]:
        """Numbers of the data set's folds, ascending; none where its split has names."""
        found = {str(split) for split in self.split if str(split).isdigit()}
        return tuple(sorted(found, key=int))

    def with_test_fold(self, fold: str) -> LabelledArrays:
        """Return the same with one numbered fold as "test" and all others as "train".

        Raises:
            DatasetError: the data set has no such fold.
        """
        if fold not in self.folds:
            listed = ", ".join(self.folds) or "none"
            raise DatasetError(f"fold {fold!r}: the data set has the folds {listed}")
        return replace(self, split=np.where(self.split == fold, "test", "train"))

    def with_group_folds(self, num_folds: int, seed: int) -> LabelledArrays:
        """Return the same parted into numbered folds by group, classes as even as groups allow.

        Images of several labels are spread by the first of them.

        Raises:
            DatasetError: there are fewer groups, or images of a class, than folds.
        """
        labels = self.targets.argmax(axis=1) if self.targets.ndim == 2 else self.targets
        split = np.zeros(len(self), dtype=np.int64)
        for number, test in enumerate(group_folds(labels, self.groups, num_folds, seed)):
            split[test] = number
        return replace(self, split=split.astype(np.str_))

    def __len__(self) -> int:
        return len(self.images)


def read_labelled(layout: str, path: Path, *, image_size: int | None) -> LabelledArrays:
    """Read a data set of any layout.

    Args:
        layout: key of `DATASETS`.
        path: the data folder, or the one file that the data set is.
        image_size: side of the images: box means where they shrink, linear where they grow. Of an
            image file the centre square is taken; other images are resized axis by axis. None
            keeps the size, which must then be the same for all.

    Raises:
        RecipeError: there is no such layout.
        DatasetError: the data can't be used; the line names the file or row.
    """
    if image_size is not None and image_size < 1:
        raise DatasetError(f"image size {image_size}: expected at least 1 pixel")
    require_layout(layout, path)
    if layout == "medmnist":
        found = _from_medmnist(load_medmnist(path), image_size)
    else:
        dataset = read_dataset(layout, path)
        is_volume = dataset.tiles[0].pixels is not None
        found = _cubes(dataset, image_size) if is_volume else _tiles(dataset, path, image_size)
    return replace(found, fingerprint=_fingerprint(found))


def _from_medmnist(found: Medmnist, image_size: int | None) -> LabelledArrays:
    sides = list(found.images)
    images = np.concatenate([_channels_first(found.images[side]) for side in sides])
    labels = np.concatenate([found.labels[side] for side in sides])
    names = [f"{side}_images[{i}]" for side in sides for i in range(len(found.images[side]))]
    twins = [f"{side}_images[{i}]" for side in sides for i in found.first_twin[side]]
    several = found.multilabel
    return LabelledArrays(
        images=_resized(images, image_size),
        targets=labels.astype(np.float32) if several else labels,
        task="multilabel" if several else _task(found.classes),
        classes=found.classes,
        groups=_numbers(twins),
        split=np.concatenate([np.full(len(found.images[side]), side) for side in sides]),
        names=tuple(names),
        warnings=tuple(found.warnings),
        fingerprint="",
    )


def _cubes(dataset: TileDataset, image_size: int | None) -> LabelledArrays:
    cubes = np.stack([tile.pixels for tile in dataset.tiles if tile.pixels is not None])
    names = [tile_name(tile, tile.path) for tile in dataset.tiles]
    return _single_label(dataset, _resized(_channels_first(cubes), image_size), names, ())


def _tiles(dataset: TileDataset, data_dir: Path, image_size: int | None) -> LabelledArrays:
    survey = survey_tiles(dataset.tiles, image_size or 1, data_dir, bar)
    if image_size is None:
        image_size = _common_side(survey.shapes)
    preprocess = replace(choose_preprocess(survey, DataRecipe()), image_size=image_size)
    arrays = load_tiles(dataset.tiles, dataset.classes, preprocess, data_dir, bar, keep_blank=True)
    return _single_label(dataset, arrays.tiles.numpy(), arrays.names, survey.warnings)


def _common_side(shapes: tuple[tuple[int, int], ...]) -> int:
    if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
        listed = " and ".join(f"{width} x {height}" for height, width in shapes[:2])
        raise DatasetError(
            f"tiles are of {listed} pixels: give one image size for all, such as 224"
        )
    return shapes[0][0]


def _single_label(
    dataset: TileDataset,
    images: NDArray[Any],
    names: tuple[str, ...] | list[str],
    warnings: tuple[str, ...],
) -> LabelledArrays:
    of_class = {name: number for number, name in enumerate(dataset.classes)}
    return LabelledArrays(
        images=images,
        targets=np.array([of_class[tile.label] for tile in dataset.tiles], dtype=np.int64),
        task=_task(dataset.classes),
        classes=dataset.classes,
        groups=_numbers([tile.patient for tile in dataset.tiles]),
        split=np.array([tile.split or "train" for tile in dataset.tiles]),
        names=tuple(names),
        warnings=(*dataset.warnings, *warnings),
        fingerprint="",
    )


def _task(classes: tuple[str, ...]) -> Task:
    return "binary" if len(classes) == 2 else "multiclass"


def _numbers(names: list[str]) -> NDArray[np.int64]:
    """A number for each name, the same for the same."""
    numbers = np.unique(np.array(names), return_inverse=True)[1]
    return numbers.astype(np.int64)


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(images, -1, 1)


def _resized(images: NDArray[Any], image_size: int | None) -> NDArray[Any]:
    """`(n, C, ...)` with every further axis of one length, in the same dtype."""
    inner = images.shape[2:]
    if image_size is None or set(inner) == {image_size}:
        return np.ascontiguousarray(images)
    shape = (images.shape[1], *(image_size for _ in inner))
    out = np.empty((len(images), *shape), images.dtype)
    for image, slot in zip(images, out, strict=True):
        small = area_resize(image, shape)
        slot[:] = np.rint(small) if images.dtype.kind in "iu" else small
    return out


def _fingerprint(found: LabelledArrays) -> str:
    facts = (found.classes, found.names, found.split.tolist(), found.groups.tolist())
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in (found.images, found.targets):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
