"""Small data sets of every layout, as a user would have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 32


def pixels(seed: int) -> np.ndarray:
    """`(32, 32, 3)` uint8 that no other seed gives."""
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)
    return path


def write_csv(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def hospital(root: Path) -> Path:
    from cdt_train.data.phantom import write_phantom

    write_phantom(root, seed=3, n_patients=2, n_ct=1, regions_per_class=1)
    return root


def image_folders(root: Path) -> Path:
    for seed, name in enumerate(
        f"{side}/{label}/{number}.png"
        for side in ("train", "valid", "test")
        for label in ("a", "b")
        for number in range(3)
    ):
        image(root / name, seed)
    return root


def csv_folds(root: Path) -> Path:
    lines = ["image_path,label,fold,patient_id,sha256"]
    for number in range(12):
        image(root / "tiles" / f"{number}.png", number)
        label, patient = "ab"[number % 2], f"P{number // 2}"
        lines.append(f"tiles/{number}.png,{label},{number // 2 % 3},{patient},-")
    write_csv(root / "folds.csv", *lines)
    return root


def medmnist_arrays(
    train: int = 8, others: int = 4, shape: tuple[int, ...] = (28, 28, 3)
) -> dict[str, np.ndarray]:
    """Arrays of a file of two classes in turn."""
    rng = np.random.default_rng(0)
    arrays = {}
    for side, count in (("train", train), ("val", others), ("test", others)):
        arrays[f"{side}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{side}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    return arrays


def medmnist(root: Path) -> Path:
    return write_npz(root / "mnist.npz", **medmnist_arrays())


def volume(seed: int, shape: tuple[int, int, int] = (40, 36, 34)) -> np.ndarray:
    """`(D, H, W)` int16 HU."""
    return np.random.default_rng(seed).integers(-1024, 1000, shape).astype(np.int16)


def volumes_npz(root: Path) -> Path:
    lines = ["volume,z,y,x,label"]
    for name in ("one", "two"):
        write_npz(root / f"{name}.npz", hu=volume(len(name)), spacing_mm=np.full(3, 2.0))
        lines += [f"{name}.npz,{z},16,17,{label}" for z, label in ((16, "lung"), (20, "bone"))]
    write_csv(root / "index.csv", *lines)
    return root


MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "hospital": hospital,
    "image_folders": image_folders,
    "csv": csv_folds,
    "medmnist": medmnist,
    "volumes_npz": volumes_npz,
}
