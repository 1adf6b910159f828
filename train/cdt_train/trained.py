"""A finished model, read back from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdt_runtime.errors import CheckpointError
from cdt_runtime.preprocess import Preprocess
from cdt_train.checkpoint import load_checkpoint, load_weights
from cdt_train.config import Recipe, recipe_from
from cdt_train.encoders.chosen import path_card
from cdt_train.fold_phases import model_of
from cdt_train.hub import FACTS, load_pretrained
from cdt_train.models.transfer_model import TransferModel

NEEDED = (*FACTS, "model_state_dict")
CALIBRATED = (
    "learnt_scale",
    "temperature",
    "temperatures",
    "temperatures_with_ct",
    "fit",
    "ct_context",
    "ct_gain",
)


@dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint, taken apart.

    Attributes:
        model: in evaluation mode, on the CPU.
        recipe: what it was trained with.
        preprocess: what it takes in.
        info: `dataset_info` of the checkpoint.
        calibration: scale and temperatures, with how they were found.
        test: figures of the held-out fold.
    """

    model: TransferModel
    recipe: Recipe
    preprocess: Preprocess
    info: Mapping[str, Any]
    calibration: Mapping[str, Any]
    test: Mapping[str, Any]

    @property
    def scale(self) -> float:
        """The calibrated factor of the negative squared distance, without CT."""
        return float(self.calibration["learnt_scale"] / self.calibration["temperature"])

    @property
    def scale_with_ct(self) -> float:
        """The same with a CT, which makes answers surer or less sure."""
        heat = self.temperatures["with_ct"][self.recipe.training.k_shot]
        return float(self.calibration["learnt_scale"] / heat)

    @property
    def temperatures(self) -> dict[str, dict[int, float]]:
        """The temperature of each K, `with_ct` and `without_ct`."""
        return temperatures_of(self.calibration)


def temperatures_of(calibration: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Return the temperature of each K, `with_ct` and `without_ct`, as `measure` takes them."""
    names = {"without_ct": "temperatures", "with_ct": "temperatures_with_ct"}
    return {
        row: {int(k): float(value) for k, value in calibration[name].items()}
        for row, name in names.items()
    }


def load_trained(path: Path) -> Trained:
    """Read a finished model: a checkpoint, or a folder that `save-pretrained` wrote.

    Raises:
        CheckpointError: missing, damaged, unfinished, or not one of ours.
    """
    content = load_pretrained(path) if path.is_dir() else load_checkpoint(path, NEEDED)
    absent = [name for name in CALIBRATED if name not in content["calibration"]]
    if absent:
        raise CheckpointError(
            f"{path}: its calibration lacks {', '.join(absent)}: an earlier version made it: train "
            f"again"
        )
    recipe = recipe_from(content["config"])
    preprocess = Preprocess.from_dict(content["preprocess"])
    path_card(recipe.model, content["dataset_info"].get("path_encoder"))
    model = model_of(recipe, len(preprocess.channels), len(content["dataset_info"]["classes"]))
    load_weights(model, content["model_state_dict"], path)
    model.eval()
    return Trained(
        model,
        recipe,
        preprocess,
        content["dataset_info"],
        content["calibration"],
        content["test"],
    )
