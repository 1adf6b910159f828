"""The training data once more: support tiles, what proves an export, and what calibrates it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdt_export.int8_choice import Calibration
from cdt_export.parity import HeldOut
from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoders import Encode, Encoders
from cdt_runtime.errors import DatasetError, ExportError
from cdt_train.config import Recipe
from cdt_train.data import TileDataset, read_dataset
from cdt_train.data.arrays import CtArrays, TileArrays, load_ct, load_tiles
from cdt_train.data.dataset import CtSeries, LabelledTile, tile_name
from cdt_train.encoders.chosen import chosen_encoders
from cdt_train.models.features import FeatureTokens
from cdt_train.progress import bar
from cdt_train.split import SUPPORT
from cdt_train.trained import Trained

MAX_HELD_OUT = 256
"""Held-out tiles that the parity check runs, spread evenly over the test fold."""
MAX_SERIES = 8
"""CT series, in their order, that are tried for one that can be read; as many calibrate int8."""
CALIBRATION_TILES = 128
"""Training tiles that calibrate int8."""
CALIBRATION = 100
"""Purpose of the random numbers that choose them, as `cdt_train.split` has its own."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The data that a model was trained on, found again and checked.

    Attributes:
        trained: the model.
        folder: where the data is now.
        dataset: its tiles and series.
        by_name: tiles by the name that the training knew them under.
        encoders: foundation encoders that the model listens to.
    """

    trained: Trained
    folder: Path
    dataset: TileDataset
    by_name: Mapping[str, LabelledTile]
    encoders: Encoders

    def tiles(self, names: Sequence[str]) -> TileArrays:
        """Read tiles.

        Raises:
            DatasetError: an image is another one than the model was trained on.
        """
        tiles = [self.by_name[name] for name in names]
        classes = tuple(self.trained.info["classes"])
        preprocess = self.trained.preprocess
        arrays = load_tiles(tiles, classes, preprocess, self.folder, bar, encoders=self.encoders)
        for name, digest in zip(names, arrays.sha256, strict=True):
            if digest != self.trained.info["tile_facts"][name][0]:
                raise DatasetError(
                    f"{self.folder}: {name} is another image than the model was trained on: give "
                    f"the --data-dir that it was trained on"
                )
        return arrays

    def plain_tiles(self, names: Sequence[str]) -> TileArrays:
        """Read tiles as `tiles` does, without asking foundation encoders."""
        blind = Encoders((), _never_asked, TokenCache(None))
        return replace(self, encoders=blind).tiles(names)

    def ct(self, series: Iterable[CtSeries]) -> CtArrays:
        """Read series; those that can't be used are left out."""
        chosen = replace(self.dataset, ct=tuple(series))
        return load_ct(chosen, self.trained.preprocess, self.folder, bar, self.encoders)[0]

    def owners(self, names: Sequence[str]) -> list[str]:
        """The patient of each tile."""
        return [self.by_name[name].patient for name in names]


def _never_asked(card: EncoderCard) -> Encode:
    raise AssertionError(f"{card.key}: no encoder was to be asked")


def open_data(trained: Trained, data_dir: Path | None) -> TrainingData:
    """Find the data of a training run again.

    Args:
        trained: what `load_trained` gave.
        data_dir: where the data is, if it has moved since.

    Raises:
        DatasetError: it is gone, or its tiles are missing or labelled otherwise.
    """
    if trained.info["split"] is None:
        raise ExportError(
            "the model was saved without its split: cdt-train save-pretrained --with-names keeps it"
        )
    if data_dir is None and trained.info["data_dir"] is None:
        raise ExportError("where is the training data? give --data-dir")
    folder = data_dir or Path(trained.info["data_dir"])
    if not folder.exists():
        raise DatasetError(
            f"training data not found at {folder}: give --data-dir: prototypes are made from it"
        )
    ct_dir = trained.info.get("ct_dir")
    dataset = read_dataset(trained.info["layout"], folder, Path(ct_dir) if ct_dir else None)
    by_name = {tile_name(tile, folder): tile for tile in dataset.tiles}
    facts = trained.info["tile_facts"]
    absent = [
        name for name in facts if name not in by_name or by_name[name].label != facts[name][1]
    ]
    if absent:
        raise DatasetError(
            f"{folder}: {len(absent)} tiles of the training run are missing or labelled otherwise, "
            f"first {absent[0]}: give the --data-dir that the model was trained on"
        )
    encoders = chosen_encoders(trained.recipe.model, trained.info.get("encoders", ()))
    return TrainingData(trained, folder, dataset, by_name, encoders)


def read_tiles(data: TrainingData) -> tuple[TileArrays, HeldOut]:
    """Read the support tiles, the held-out tiles and the CT that they need.

    Raises:
        DatasetError: the data has changed.
    """
    trained, split = data.trained, data.trained.info["split"]
    known = data.tiles(_spread_support(split, data.by_name, trained.recipe))
    rng = np.random.default_rng([trained.recipe.training.seed, SUPPORT])
    test = data.tiles(rng.permutation(sorted(split["test"]))[:MAX_HELD_OUT].tolist())
    owners = data.owners(known.names)
    ct = data.ct(
        found
        for n, found in enumerate(data.dataset.ct)
        if n < MAX_SERIES or found.patient in owners
    )
    volume = ct.volumes[:1] if len(ct) else torch.zeros(trained.preprocess.ct_shape)
    own, of = _own_ct(ct, owners)
    model = trained.model
    return known, HeldOut(
        known.tiles,
        known.labels,
        test.tiles,
        test.labels,
        volume,
        own.volumes,
        of,
        _flat(model.tile_features, known.features, known.tiles),
        _flat(model.tile_features, test.features, test.tiles),
        _flat(model.ct_features, ct.take(range(min(len(ct), 1))).features, volume),
        _flat(model.ct_features, own.features, own.volumes),
    )


def _flat(
    project: FeatureTokens, features: Mapping[str, torch.Tensor], like: torch.Tensor
) -> torch.Tensor | None:
    return project.flat(features, like) if project.count else None


def _own_ct(ct: CtArrays, owners: Sequence[str]) -> tuple[CtArrays, NDArray[np.int64]]:
    """Find each tile's own patient's CT, the first where there are several, as training does.

    Args:
        ct: volumes of any patients.
        owners: the patient of each tile.

    Returns:
        The volumes of these patients, and for each tile which is its own; -1 for none.
    """
    patients = [patient for patient in dict.fromkeys(owners) if patient in ct.patients]
    place = {patient: index for index, patient in enumerate(patients)}
    own = ct.take([ct.patients.index(patient) for patient in patients])
    return own, np.array([place.get(owner, -1) for owner in owners], dtype=np.int64)


def _spread_support(
    split: Mapping[str, list[str]], by_name: Mapping[str, Any], recipe: Recipe
) -> list[str]:
    """Draw k_shot tiles a class outside the test fold, from as many patients as there are."""
    rng = np.random.default_rng([recipe.training.seed, SUPPORT])
    names = sorted(split["train"] + split["val"])
    shuffled = [names[i] for i in rng.permutation(len(names))]
    chosen = []
    for label in sorted({by_name[name].label for name in names}):
        mine = [name for name in shuffled if by_name[name].label == label]
        turns: dict[str, int] = {}
        ranked = []
        for name in mine:
            patient = by_name[name].patient
            turns[patient] = turns.get(patient, 0) + 1
            ranked.append((turns[patient], name))
        ranked.sort(key=lambda entry: entry[0])
        chosen += [name for _, name in ranked[: recipe.training.k_shot]]
    return chosen


def read_calibration(data: TrainingData, proved_on: torch.Tensor) -> Calibration:
    """Read what int8 graphs are calibrated with: nothing that validates, tests or proves.

    Args:
        data: of the training run.
        proved_on: `(1, W, D, S, S)`, the volume of the parity gate.

    Raises:
        DatasetError: the data has changed.
    """
    trained, split = data.trained, data.trained.info["split"]
    rng = np.random.default_rng([trained.recipe.training.seed, CALIBRATION])
    chosen = rng.permutation(sorted(split["train"]))[:CALIBRATION_TILES].tolist()
    others = {*data.owners(split["val"]), *data.owners(split["test"])}
    series = [found for found in data.dataset.ct if found.patient not in others]
    ct = data.ct(series[: MAX_SERIES + 1])
    kept = [n for n, volume in enumerate(ct.volumes) if not torch.equal(volume, proved_on[0])]
    return Calibration(data.tiles(chosen).tiles, ct.take(kept[:MAX_SERIES]).volumes)
