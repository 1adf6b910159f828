"""The checkpoints of a phase: where they lie, and which of them a run may go on from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdt_runtime.errors import CheckpointError

STATE = (
    "epoch",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "scaler_state_dict",
    "micro_steps",
    "config",
    "history",
)


@dataclass
class Run:
    """Where a phase writes and what it adds to its checkpoints.

    Attributes:
        folder: of the checkpoints.
        prefix: of their names: `PREFIX_epoch_0001.pt`.
        config: the recipe, compared on resume.
        extra: further entries of each checkpoint.
        keep: how many checkpoints stay.
        resume: go on from the newest checkpoint.
        best_path: where the best epoch is kept, or None.
    """

    folder: Path
    prefix: str
    config: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 3
    resume: bool = False
    best_path: Path | None = None


def merit(entry: Mapping[str, float]) -> tuple[float, float]:
    """What the best epoch has most of: the score, then the lower validation loss."""
    return entry["score"], -entry.get("val_loss", 0.0)


def newest_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint of the highest epoch, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def checkpoints(run: Run) -> list[Path]:
    """Return the checkpoints of a run by their epochs."""
    pattern = re.compile(rf"{re.escape(run.prefix)}_epoch_(\d+)\.pt")
    found = [path for path in run.folder.glob("*.pt") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(pattern.fullmatch(path.name)[1]))  # type: ignore[index]


def require_same_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume with another recipe.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    for section, values in wanted.items():
        before = found.get(section, {})
        for key, value in values.items():
            if before.get(key) != value:
                raise CheckpointError(
                    f"{path}: was trained with {section}.{key}={before.get(key)!r}, now {value!r}: "
                    f"resume with the same recipe, or give another --output-dir"
                )
