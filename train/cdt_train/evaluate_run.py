"""Evaluate a finished model, as PyTorch has it or as a bundle ships it.

On the data that it was trained on: its own test tiles, with the episodes of the fold, so that the
table is that of the fold. On other data: all tiles, of whatever classes. Rows that would have to
be trained again, and the context bank, which no bundle ships, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache, cache_dir
from cdt_runtime.encoder_session import bundle_encoders
from cdt_runtime.encoders import Encoders
from cdt_runtime.errors import BundleError, DatasetError
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.prototypes import FACTS, TENSORS, Prototypes
from cdt_train.config import Recipe, recipe_from
from cdt_train.data import LabelledTile, TileDataset, read_dataset
from cdt_train.data.arrays import CtArrays, TileArrays, load_ct, load_tiles
from cdt_train.data.dataset import tile_name
from cdt_train.deployed import shipped_model
from cdt_train.encoders.chosen import chosen_encoders
from cdt_train.engine import choose_device
from cdt_train.episodes import Episode
from cdt_train.intervals import pooled_over_folds, verdict
from cdt_train.models.transfer_model import TransferModel
from cdt_train.progress import bar
from cdt_train.rows import (
    ROWS,
    differences,
    embed_rows,
    frozen_rows,
    measure,
    over_groups,
    score_rows,
    surroundings,
)
from cdt_train.split import TEST_CT, TEST_EPISODES, evaluation_episodes
from cdt_train.split_record import SPLIT, SplitRecord, short
from cdt_train.summary import rows_table
from cdt_train.trained import load_trained, temperatures_of

SHIPPED = ("with_ct", "without_ct", "without_encoders", "wrong_ct", "noise_ct")
"""Rows that a bundle can give, too."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate.

    Attributes:
        name: what results call it.
        model: in PyTorch, or behind the same interface by an engine.
        recipe: what it was trained with.
        preprocess: what it takes in.
        info: of its training: `classes`, `layout`, `fold` and, of a checkpoint, `data_dir`.
        calibration: `learnt_scale`, `fit` and the temperatures.
        split: the tiles that it knows.
        device: where it runs.
        encoders: foundation encoders that it listens to.
    """

    name: str
    model: TransferModel
    recipe: Recipe
    preprocess: Preprocess
    info: Mapping[str, Any]
    calibration: Mapping[str, Any]
    split: SplitRecord
    device: torch.device
    encoders: Encoders


@dataclass(frozen=True, eq=False)
class Side:
    """What a model is evaluated on.

    Attributes:
        test: the tiles.
        reference: tiles that standardise the colour statistics.
        seen: volumes that unpaired tiles meet.
        everyone: all volumes; paired tiles meet their own patient's.
        patients: names by group number.
        grouped_by: "patient", "group" or "tile".
        own: whether these are the test tiles of the model's own fold.
        warnings: what the readers had to say.
    """

    test: TileArrays
    reference: TileArrays
    seen: CtArrays
    everyone: CtArrays
    patients: tuple[str, ...]
    grouped_by: str
    own: bool
    warnings: tuple[str, ...]


def run_evaluation(
    path: Path,
    *,
    data_dir: Path | None = None,
    ct_dir: Path | None = None,
    layout: str | None = None,
    shots: Sequence[int] = (),
    count: int | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint or a bundle.

    Args:
        path: `best_model.pt`, or the folder of a bundle.
        data_dir: the data; None for where the training of a checkpoint had it.
        ct_dir: CT series that lie elsewhere.
        layout: of the data; None for that of the training.
        shots: every K; none for those of the training.
        count: episodes of each K; None for as many as the training had.

    Returns:
        `test`, `differences` and `over_groups` as `fold_N/metrics.json` holds them, with what they
        are of.

    Raises:
        CdtError: of any kind that the user can mend.
    """
    torch.set_flush_denormal(True)  # as training does; without it last digits would differ
    subject = _open(path)
    side = _read(subject, data_dir, ct_dir, layout)
    fold, training = subject.info["fold"], subject.recipe.training
    episodes = _episodes(subject, side.test, shots, count or training.test_episodes)
    around = surroundings(
        subject.model,
        side.seen,
        side.everyone,
        side.patients,
        paired=bool(set(side.everyone.patients) & set(side.patients)),
        seed=[training.seed, fold, TEST_CT],
        device=subject.device,
    )
    embedded = embed_rows(subject.model, side.test, around, training.seed, subject.device)
    rows = {
        **{row: embedded[row] for row in SHIPPED if row in embedded},
        **frozen_rows({}, side.test, side.reference, subject.device),
    }
    scale, fit = subject.calibration["learnt_scale"], subject.calibration["fit"]
    scores = score_rows(rows, episodes, scale, fit, training.seed)
    return {
        **_facts(subject, side, [*episodes]),
        "episodes": len(next(iter(episodes.values()))),
        "rows": {row: title for row, title in ROWS.items() if row in scores},
        "test": measure(scores, _heat(subject, [*episodes])),
        "differences": differences(scores, side.test, training.seed),
        "over_groups": over_groups(scores, side.test, training.seed),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """Return one table for each K, and what the figures come down to."""
    return "\n\n".join([*(_table(report, k) for k in report["shots"]), _reading(report)])


def _open(path: Path) -> Subject:
    return _bundle(Bundle.open(path)) if path.is_dir() else _checkpoint(path)


def _checkpoint(path: Path) -> Subject:
    trained = load_trained(path)
    device = choose_device("cpu" if trained.recipe.training.device == "cpu" else "auto")
    model = trained.model.to(device)
    model.path_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Subject(
        path.name,
        model,
        trained.recipe,
        trained.preprocess,
        trained.info,
        trained.calibration,
        SplitRecord.of(trained.info),
        device,
        chosen_encoders(trained.recipe.model, trained.info.get("encoders", ())),
    )


def _bundle(bundle: Bundle) -> Subject:
    info = bundle.manifest["training"]
    absent = [name for name in ("recipe", "layout", "fold", "classes") if name not in info]
    if absent:
        raise BundleError(
            f"{bundle.path.name}: its manifest lacks training.{absent[0]}: export again"
        )
    prototypes = Prototypes.from_files(
        bundle.read(TENSORS), bundle.read(FACTS), encoder_sha256=bundle.encoder_sha256
    )
    return Subject(
        f"{bundle.path.name} ({bundle.manifest['precision']}, {bundle.identity})",
        shipped_model(bundle),
        recipe_from(info["recipe"]),
        bundle.preprocess,
        info,
        {**prototypes.calibration, "fit": prototypes.fit},
        SplitRecord.from_bytes(bundle.read(SPLIT)),
        torch.device("cpu"),
        bundle_encoders(bundle, "onnxruntime", "auto", TokenCache(cache_dir())),
    )


def _read(subject: Subject, data_dir: Path | None, ct_dir: Path | None, layout: str | None) -> Side:
    """Read the test tiles of the model's own data, or all of other data.

    Raises:
        DatasetError: there is no data, or it is the training's, but changed.
    """
    if data_dir is None:
        if "data_dir" not in subject.info:
            raise DatasetError(
                f"{subject.name}: a bundle does not say where its data is: give --data-dir"
            )
        if ct_dir is None and subject.info.get("ct_dir"):
            ct_dir = Path(subject.info["ct_dir"])
    folder = data_dir or Path(subject.info["data_dir"])
    dataset = read_dataset(layout or subject.info["layout"], folder, ct_dir)
    tiles = _own_tiles(subject, dataset, folder)
    if tiles is None and data_dir is None:
        raise DatasetError(
            f"{folder}: is not what {subject.name} was trained on any more: give --data-dir"
        )
    ct, warnings = load_ct(dataset, subject.preprocess, folder, bar, subject.encoders)
    held: set[str] = set()
    if tiles is not None:
        test, reference = tiles
        named = _by_place(dataset, folder)
        places = np.concatenate([subject.split.sides["val"], subject.split.sides["test"]])
        held = {named[place].patient for place in places}
    else:
        test = reference = _other_tiles(subject, dataset, folder)
    return Side(
        test=test,
        reference=reference,
        seen=ct.without(held),
        everyone=ct,
        patients=_patients(dataset),
        grouped_by=dataset.grouped_by,
        own=tiles is not None,
        warnings=(*dataset.warnings, *warnings),
    )


def _own_tiles(
    subject: Subject, dataset: TileDataset, folder: Path
) -> tuple[TileArrays, TileArrays] | None:
    """Return the test and training tiles of the model's fold; None if this is other data."""
    split, named = subject.split, _by_place(dataset, folder)
    if len(named) != len(split.hashes) or list(dataset.classes) != list(subject.info["classes"]):
        return None
    found = []
    for side in ("test", "train"):
        places = split.sides[side]
        arrays = _load(subject, dataset, [named[place] for place in places], folder)
        same = np.array_equal(short(arrays.sha256), split.hashes[places])
        if not (same and np.array_equal(arrays.labels, split.labels[places])):
            return None
        found.append(arrays)
    return found[0], found[1]


def _other_tiles(subject: Subject, dataset: TileDataset, folder: Path) -> TileArrays:
    """Read all tiles of data that the model has not seen.

    Raises:
        DatasetError: it has seen some of them.
    """
    arrays = _load(subject, dataset, list(dataset.tiles), folder)
    known = subject.split.known(arrays.sha256)
    if known:
        raise DatasetError(
            f"{folder}: {subject.name} was trained on {known} of these {len(arrays)} tiles, or "
            f"chosen by them, and this is not its whole data set unchanged: give that, or tiles "
            f"that it has not seen"
        )
    return arrays


def _load(
    subject: Subject, dataset: TileDataset, tiles: list[LabelledTile], folder: Path
) -> TileArrays:
    """Read some tiles of a data set; groups are numbered over all of it, as training does."""
    arrays = load_tiles(
        tiles, dataset.classes, subject.preprocess, folder, bar, encoders=subject.encoders
    )
    number = {patient: group for group, patient in enumerate(_patients(dataset))}
    groups = np.array([number[tile.patient] for tile in tiles], dtype=np.int64)
    return replace(arrays, groups=groups)


def _by_place(dataset: TileDataset, folder: Path) -> list[LabelledTile]:
    """Tiles in the order of their names, as `SplitRecord` counts them."""
    return sorted(dataset.tiles, key=lambda tile: tile_name(tile, folder))


def _patients(dataset: TileDataset) -> tuple[str, ...]:
    return tuple(sorted({tile.patient for tile in dataset.tiles}))


def _episodes(
    subject: Subject, test: TileArrays, shots: Sequence[int], count: int
) -> dict[int, list[Episode]]:
    """Draw the episodes of each K that was asked for, or of each that fits.

    Raises:
        DatasetError: one that was asked for does not fit, or none does.
    """
    training, found = subject.recipe.training, {}
    stream = [subject.info["fold"], TEST_EPISODES]
    wanted = sorted({*shots}) or sorted(temperatures_of(subject.calibration)["without_ct"])
    for k in wanted:
        try:
            found[k] = evaluation_episodes(test, training, k, count, stream)
        except DatasetError:
            if shots or (k == wanted[-1] and not found):
                raise
    return found


def _heat(subject: Subject, shots: Sequence[int]) -> dict[str, dict[int, float]]:
    """Temperature of each K: the fitted one, or that of the nearest K."""
    return {
        row: {k: by_k[_nearest(by_k, k)] for k in shots}
        for row, by_k in temperatures_of(subject.calibration).items()
    }


def _nearest(by_k: Mapping[int, float], k: int) -> int:
    return min(by_k, key=lambda fitted: (abs(fitted - k), fitted))


def _facts(subject: Subject, side: Side, shots: Sequence[int]) -> dict[str, Any]:
    fitted = temperatures_of(subject.calibration)["without_ct"]
    notes = [
        f"no temperature was fitted for K = {k}: it uses that of K = {_nearest(fitted, k)}"
        for k in shots
        if k not in fitted
    ]
    if not side.own:
        notes.append("colour statistics are standardised by these tiles themselves")
    return {
        "model": subject.name,
        "own_test_tiles": side.own,
        "fold": subject.info["fold"],
        "tiles": len(side.test),
        "classes": list(side.test.classes),
        "grouped_by": side.grouped_by,
        "groups": len(np.unique(side.test.groups)),
        "ct_series": len(side.everyone),
        "paired": bool(set(side.everyone.patients) & set(side.patients)),
        "fit": subject.calibration["fit"],
        "shots": [str(k) for k in shots],
        "warnings": list(side.warnings),
        "notes": notes,
    }


def _table(report: Mapping[str, Any], k: str) -> str:
    whose = f"test {report['grouped_by']}s of fold {report['fold']}"
    if not report["own_test_tiles"]:
        whose = f"{report['groups']} {report['grouped_by']}s of other data"
    heading = (
        f"{len(report['classes'])}-way {k}-shot on {whose}: {report['tiles']} tiles, "
        f"{report['episodes']} episodes"
    )
    cells = {
        row: {name: {"mean": value} for name, value in by_k[k].items()}
        for row, by_k in report["test"].items()
    }
    return rows_table(heading, report["rows"], cells, folds=1)


def _reading(report: Mapping[str, Any]) -> str:
    lines = []
    for k in report["shots"]:
        for name, by_k in report["differences"].items():
            first, second = (report["rows"][row] for row in name.split(" - "))
            found = pooled_over_folds([by_k[k]])
            mean, half = 100 * found["mean"], 100 * found["ci95"]
            lines.append(
                f"{first} against {second}, {k}-shot: {mean:+.1f} points ± {half:.1f} over "
                f"{found['groups']} {report['grouped_by']}s (95 %): {verdict(mean, half)}."
            )
        for row, spread in report["over_groups"].items():
            interval = spread[k]
            lines.append(
                f"{report['rows'][row]}, {k}-shot: accuracy {interval['low']:.3f} to "
                f"{interval['high']:.3f} over {interval['groups']} {report['grouped_by']}s (95 %)."
            )
    if not report["ct_series"]:
        lines.append("There was no CT: nothing is said about it.")
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join([*lines, f"model     {report['model']}"])
