"""Which tiles a model was trained on, kept without their names: those may name patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import BundleError

SPLIT = "split.safetensors"
SIDES = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class SplitRecord:
    """The split of a fold; tiles are known by their place among the sorted names of all.

    Attributes:
        hashes: `(n,)` uint64, the start of the SHA-256 of each tile of the data set.
        labels: `(n,)` uint16, the class of each.
        sides: places of the tiles of `train`, `val` and `test`, in the order of the fold.
    """

    hashes: NDArray[np.uint64]
    labels: NDArray[np.uint16]
    sides: Mapping[str, NDArray[np.uint32]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> SplitRecord:
        """Take the split from `dataset_info` of a checkpoint."""
        facts, names = info["tile_facts"], sorted(info["tile_facts"])
        place = {name: index for index, name in enumerate(names)}
        number = {name: index for index, name in enumerate(info["classes"])}
        return cls(
            short([facts[name][0] for name in names]),
            np.array([number[facts[name][1]] for name in names], dtype=np.uint16),
            {
                side: np.array([place[name] for name in info["split"][side]], dtype=np.uint32)
                for side in SIDES
            },
        )

    def to_bytes(self) -> bytes:
        """Return the file that a bundle keeps."""
        from safetensors.numpy import save

        return save({"hashes": self.hashes, "labels": self.labels, **self.sides})

    @classmethod
    def from_bytes(cls, data: bytes) -> SplitRecord:
        """Read back what `to_bytes` gave.

        Raises:
            BundleError: it is not such a file.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            found = load(data)
            return cls(found["hashes"], found["labels"], {side: found[side] for side in SIDES})
        except (SafetensorError, KeyError) as error:
            raise BundleError(f"{SPLIT}: can't be read ({error}): export again") from error

    def known(self, sha256: Sequence[str]) -> int:
        """Count tiles that the model was trained on, or chosen by."""
        places = np.concatenate([self.sides["train"], self.sides["val"]])
        return int(np.isin(short(sha256), self.hashes[places]).sum())


def short(sha256: Sequence[str]) -> NDArray[np.uint64]:
    """Return the first 8 bytes of hashes, as numbers."""
    return np.array([int(digest[:16], 16) for digest in sha256], dtype=np.uint64)
