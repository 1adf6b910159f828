"""MedMNIST files, and what npz files of strangers may hold."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import medmnist_arrays, write_npz

from cdt_runtime.errors import DatasetError
from cdt_train.config import load_recipe
from cdt_train.data import npz, read_medmnist
from cdt_train.data.labelled import read_labelled
from cdt_train.data.load import read_data

Arrays = dict[str, Any]


def write(folder: Path, arrays: Arrays) -> Path:
    return write_npz(folder / "mnist.npz", **arrays)


def test_splits_labels_and_pixels(tmp_path: Path) -> None:
    arrays = medmnist_arrays() | {"label_names": np.array(["benign", "malignant"])}
    dataset = read_medmnist(write(tmp_path, arrays))
    assert dataset.classes == ("benign", "malignant")
    assert [tile.split for tile in dataset.tiles] == ["train"] * 8 + ["val"] * 4 + ["test"] * 4
    tile = dataset.tiles[9]
    assert (tile.name, tile.label, tile.patient) == ("val_images[1]", "malignant", "val_images[1]")
    assert np.array_equal(tile.pixels, arrays["val_images"][1])
    assert dataset.grouped_by == "tile"
    assert dataset.warnings[0].endswith("results must not be called patient-level")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 20), (1, 20, 20)),
        ((20, 20, 3), (3, 20, 20)),
        ((20, 20, 1), (1, 20, 20)),
        ((12, 12, 12), (1, 12, 12, 12)),
        ((12, 12, 12, 3), (3, 12, 12, 12)),
    ],
)
def test_every_shape_of_images(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    arrays = medmnist_arrays(shape=shape)
    found = read_labelled("medmnist", write(tmp_path, arrays), image_size=None)
    assert found.images.shape == (16, *expected)
    assert found.images.dtype == np.uint8
    first = arrays["train_images"][0].reshape(*expected[1:], expected[0])
    assert np.array_equal(np.moveaxis(found.images[0], 0, -1), first)
    smaller = read_labelled("medmnist", write(tmp_path, arrays), image_size=8)
    assert smaller.images.shape[2:] == (8,) * (len(expected) - 1)
    assert abs(int(smaller.images.mean()) - int(found.images.mean())) <= 1


def test_gray_tiles_for_episodes(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.layout=medmnist", "data.image_size=32"])
    data = read_data(recipe, write(tmp_path, medmnist_arrays(shape=(28, 28))))
    assert data.preprocess.channels == ("gray",)
    assert not data.preprocess.fill_missing
    assert data.tiles.tiles.shape == (16, 1, 32, 32)
    assert data.tiles.split is not None
    assert data.tiles.take(np.array([15, 0])).split == ("test", "train")


def test_several_labels_an_image(tmp_path: Path) -> None:
    arrays = medmnist_arrays()
    for side in ("train", "val", "test"):
        count = len(arrays[f"{side}_labels"])
        arrays[f"{side}_labels"] = np.stack([np.ones(count), np.arange(count) % 2], 1).astype(int)
    path = write(tmp_path, arrays)
    found = read_labelled("medmnist", path, image_size=None)
    assert found.task == "multilabel"
    assert found.targets.dtype == np.float32
    assert found.targets[:2].tolist() == [[1, 0], [1, 1]]
    assert found.classes == ("0", "1")
    with pytest.raises(DatasetError, match="an image has 2 labels of 0 or 1 each, and few-shot ep"):
        read_medmnist(path)


def test_train_alone_has_no_split(tmp_path: Path) -> None:
    arrays = {k: v for k, v in medmnist_arrays().items() if k.startswith("train")}
    assert {tile.split for tile in read_medmnist(write(tmp_path, arrays)).tiles} == {None}


def test_a_split_without_test_is_said(tmp_path: Path) -> None:
    arrays = {k: v for k, v in medmnist_arrays().items() if not k.startswith("test")}
    recipe = load_recipe(None, ["data.layout=medmnist", "data.image_size=32"])
    data = read_data(recipe, write(tmp_path, arrays))
    assert any(
        note.startswith("the data set has no test split: its val split is the test side")
        for note in data.info["warnings"]
    )


def test_copies_in_one_split_are_one_group(tmp_path: Path) -> None:
    arrays = medmnist_arrays()
    arrays["train_images"][2] = arrays["train_images"][0]
    path = write(tmp_path, arrays)
    dataset = read_medmnist(path)
    assert [tile.patient for tile in dataset.tiles[:3]] == [
        "train_images[0]",
        "train_images[1]",
        "train_images[0]",
    ]
    assert dataset.warnings[1] == f"{path}: 1 image the same as an earlier one: kept together"
    groups = read_labelled("medmnist", path, image_size=None).groups
    assert groups[0] == groups[2]
    assert len(set(groups)) == 15


def put(name: str, index: Any, value: Any) -> Any:
    """A change of one value of one array."""

    def change(arrays: Arrays) -> None:
        arrays[name][index] = value

    return change


def swap(name: str, make: Any) -> Any:
    """A change of one array, or the removal of it."""

    def change(arrays: Arrays) -> None:
        array = make(arrays.get(name))
        arrays.pop(name, None) if array is None else arrays.update({name: array})

    return change


def twin(arrays: Arrays) -> None:
    arrays["test_images"][0] = arrays["train_images"][0]


def relabelled(arrays: Arrays) -> None:
    arrays["train_images"][1] = arrays["train_images"][0]


FAULTS = {
    "no train": (
        swap("train_images", lambda _: None),
        "has no array 'train_images', only test_images, test_labels, train_labels, val_images, val",
    ),
    "no labels": (swap("val_labels", lambda _: None), "has no array 'val_labels', only"),
    "lengths": (swap("val_labels", lambda a: a[:3]), "4 val_images but 3 val_labels: they must be"),
    "dtype": (
        swap("train_images", lambda a: a.astype(np.int64)),
        "array 'train_images' is int64, expected uint8 or int16 or float32: convert it",
    ),
    "objects": (
        swap("train_labels", lambda a: np.array([[x] for x in range(8)], dtype=object)),
        "array 'train_labels' is object, expected numbers or text: pickled objects are not read",
    ),
    "fractions": (
        swap("train_labels", lambda a: a.astype(float)),
        "array 'train_labels' is float64 of shape (8, 1), expected whole numbers (n, 1) or (n, L)",
    ),
    "flat": (
        swap("train_images", lambda a: a.reshape(8, -1)),
        "array 'train_images' has the shape (8, 2352), expected (n, H, W), (n, H, W, 3) or",
    ),
    "none": (
        swap("val_images", lambda a: a[:0]),
        "array 'val_images' has the shape (0, 28, 28, 3), expected (n, H, W)",
    ),
    "unlike sizes": (
        swap("val_images", lambda a: a[:, :20]),
        "val_images are uint8 of shape (20, 28, 3) each, train_images uint8 of (28, 28, 3): they",
    ),
    "unlike dtypes": (
        swap("val_images", lambda a: a.astype(np.float32)),
        "val_images are float32 of shape (28, 28, 3) each, train_images uint8 of",
    ),
    "far label": (put("train_labels", 3, 200), "labels run up to 200 for 16 images: number the cl"),
    "gap": (put("test_labels", 3, 3), "class '2' has no image in train_images: add some, or leave"),
    "one class": (
        lambda arrays: [arrays[f"{s}_labels"].fill(0) for s in ("train", "val", "test")],
        "has one class only, '0': at least 2 are needed",
    ),
    "negative": (
        swap("train_labels", lambda a: a.astype(np.int8) - 1),
        "train_labels[0] is -1, expected 0 to 1",
    ),
    "beyond names": (
        lambda arrays: (
            arrays.update(label_names=np.array(["a", "b"])),
            arrays["val_labels"].__setitem__(2, 2),
        ),
        "val_labels[2] is 2, expected 0 to 1",
    ),
    "name twice": (
        swap("label_names", lambda _: np.array(["a", "a"])),
        "array 'label_names' has an empty name, or one twice",
    ),
    "names of numbers": (
        swap("label_names", lambda _: np.array([1, 2])),
        "array 'label_names' is int64 of shape (2,), expected text, one name a class",
    ),
    "label of 2": (
        lambda arrays: [
            arrays.update({f"{s}_labels": np.repeat(arrays[f"{s}_labels"] * 2, 2, axis=1)})
            for s in ("train", "val", "test")
        ],
        "train_labels[1, 0] is 2, expected 0 to 1",
    ),
    "copy in two splits": (
        twin,
        "test_images[0] and train_images[0] are the same image in two splits, or under two labels",
    ),
    "copy with two labels": (relabelled, "train_images[1] and train_images[0] are the same image"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(tmp_path: Path, change: Any, message: str) -> None:
    arrays = medmnist_arrays()
    change(arrays)
    path = write(tmp_path, arrays)
    with pytest.raises(DatasetError) as caught:
        read_medmnist(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_nan_names_its_row(tmp_path: Path) -> None:
    arrays = medmnist_arrays()
    for side in ("train", "val", "test"):
        arrays[f"{side}_images"] = arrays[f"{side}_images"].astype(np.float32) / 255
    arrays["val_images"][2, 5, 5] = np.nan
    with pytest.raises(
        DatasetError, match="array 'val_images' has NaN or infinity at index 2: lea"
    ):
        read_medmnist(write(tmp_path, arrays))


class TestHostileFiles:
    def fails(self, path: Path, message: str) -> None:
        with pytest.raises(DatasetError) as caught:
            read_medmnist(path)
        assert str(caught.value).startswith(f"{path}: {message}")

    def test_no_npz(self, tmp_path: Path) -> None:
        path = tmp_path / "mnist.npz"
        path.write_bytes(b"no zip")
        self.fails(path, "is no npz file, or cut short: fetch it again")

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_cut_short(self, tmp_path: Path, share: float) -> None:
        path = write(tmp_path, medmnist_arrays())
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        self.fails(path, "is no npz file, or cut short: fetch it again")

    def test_a_flipped_byte(self, tmp_path: Path) -> None:
        path = write(tmp_path, medmnist_arrays())
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"array '\w+' is damaged: fetch the file again"):
            read_medmnist(path)

    def member(self, path: Path, content: bytes) -> Path:
        arrays = medmnist_arrays()
        del arrays["train_images"]
        write_npz(path, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train_images.npy", content)
        return path

    def header(self, shape: str, descr: str = "'|u1'") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def test_a_header_that_promises_more_than_it_holds(self, tmp_path: Path) -> None:
        path = self.member(tmp_path / "m.npz", self.header("(1000000, 1000, 1000)") + b"\0" * 9)
        self.fails(
            path,
            "array 'train_images' of shape (1000000, 1000, 1000) takes 1000000000000 bytes and "
            "has 9: fetch the file again",
        )

    def test_a_negative_shape(self, tmp_path: Path) -> None:
        path = self.member(tmp_path / "m.npz", self.header("(-1, -9)") + b"\0" * 9)
        self.fails(path, "array 'train_images' of shape (-1, -9) takes 9 bytes and has 9: fetch")

    @pytest.mark.parametrize(
        "content", [b"", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, b"text"]
    )
    def test_no_header(self, tmp_path: Path, content: bytes) -> None:
        path = self.member(tmp_path / "m.npz", content)
        self.fails(path, "array 'train_images' is damaged: fetch the file again")

    def test_a_record(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(3, dtype=[("a", "u1"), ("b", "f4")]))
        path = self.member(tmp_path / "m.npz", buffer.getvalue())
        self.fails(path, "array 'train_images' is void40, expected numbers or text")

    def test_an_array_twice(self, tmp_path: Path) -> None:
        path = write(tmp_path, medmnist_arrays())
        with (
            zipfile.ZipFile(path, "a") as archive,
            pytest.warns(UserWarning, match="Duplicate name"),
        ):
            archive.writestr("train_images.npy", b"")
        self.fails(path, "array 'train_images' is there twice: save it again")

    def test_over_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(npz, "MAX_BYTES", 30_000)
        path = write(tmp_path, medmnist_arrays())
        self.fails(path, "decodes to 0 GiB, over the limit of 0 GiB a file ('train_images' has the")

    def test_a_folder_of_two(self, tmp_path: Path) -> None:
        for name in ("a.npz", "b.npz"):
            write_npz(tmp_path / name, **medmnist_arrays())
        self.fails(tmp_path, "expected one npz file, found a.npz, b.npz: give its path")


def test_the_real_file(real_data: Path) -> None:
    found = read_labelled("medmnist", real_data / "shape3d", image_size=None)
    assert found.images.shape == (1286, 1, 64, 64, 64)
    assert set(np.unique(found.images[:50])) == {0, 255}
    assert found.task == "binary"
    counts = [np.bincount(found.targets[found.split == side]).tolist() for side in ("train", "val")]
    assert counts == [[929, 259], [76, 22]]
    assert len(set(found.groups)) == 1286
