"""A finished model as a folder in the format of the Hugging Face hub, and back.

    config.json         recipe, preprocessing, data, calibration and test figures
    model.safetensors   weights
    README.md           model card: what it is, and what was measured

`hf upload NAME FOLDER` puts it there; nothing here talks to the hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdt_runtime import __version__
from cdt_runtime.errors import CheckpointError
from cdt_runtime.files import new_folder
from cdt_runtime.report import NOTICE
from cdt_train.checkpoint import content_sha256

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
KIND = "cdt-edge"
FACTS = (
    "epoch",
    "best_metric",
    "config",
    "preprocess",
    "dataset_info",
    "calibration",
    "test",
)
PATHS, NAMES = ("data_dir", "ct_dir"), ("tile_facts", "split")
"""Of `dataset_info`, folders of this machine, and what holds names of files and patients."""
ROWS = {
    "without_ct": "without CT",
    "with_ct": "with CT",
    "wrong_ct": "wrong patient's CT",
    "frozen_features": "frozen features",
    "permuted_labels": "permuted labels",
}
"""Rows of the card's table: the model, and the controls that it has to beat."""


def save_pretrained(
    content: Mapping[str, Any],
    folder: Path,
    over_folds: Mapping[str, Any] | None = None,
    *,
    with_names: bool = False,
) -> None:
    """Write a checkpoint's content as a folder of the hub.

    Args:
        content: what `load_checkpoint` gave.
        folder: to make; must not exist, or be empty.
        over_folds: of `metrics.json`, the figures over all folds.
        with_names: keep the names of tiles and patients' folders, which the split is written in;
            without it the model can't be exported from this folder, for export takes its support
            and its test tiles by that split.

    Raises:
        CheckpointError: `folder` is not empty, or can't be written.
    """
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in content["model_state_dict"].items()}
    facts = {name: content[name] for name in FACTS}
    hidden = PATHS if with_names else (*PATHS, *NAMES)
    facts["dataset_info"] = {
        name: None if name in hidden else value for name, value in facts["dataset_info"].items()
    }
    whole = {**facts, "model_state_dict": state}
    config = {
        "model_type": KIND,
        "cdt_edge_version": __version__,
        **facts,
        "content_sha256": content_sha256(whole),
    }
    try:
        with new_folder(folder) as staging:
            save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
            (staging / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
            (staging / CARD).write_text(card_text(folder.name, facts, over_folds), "utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}: give another folder") from error


def load_pretrained(folder: Path) -> dict[str, Any]:
    """Read a folder of the hub back; what `load_checkpoint` gives of a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or the folder is none of ours.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        state = load_file(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: lacks {CONFIG} or {WEIGHTS}, or they can't be read ({error.strerror})"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is damaged: fetch it again") from error
    absent = [name for name in FACTS if not isinstance(config, dict) or name not in config]
    if absent or config.get("model_type") != KIND:
        raise CheckpointError(f"{folder}: no model of cdt-train: its {CONFIG} is another's")
    content = {name: config[name] for name in FACTS}
    content["model_state_dict"] = state
    if config.get("content_sha256") != content_sha256(content):
        raise CheckpointError(
            f"{folder}: its content does not fit its hash: it was damaged, or changed after it was "
            "saved: fetch it again"
        )
    return content


def card_text(
    name: str, facts: Mapping[str, Any], over_folds: Mapping[str, Any] | None = None
) -> str:
    """Write the model card, with what was measured on the held-out fold.

    Args:
        name: of the model.
        facts: a checkpoint's `FACTS`.
        over_folds: figures over all folds, where they are at hand.
    """
    info, recipe, test = facts["dataset_info"], facts["config"], facts["test"]
    shots = sorted(next(iter(test.values())), key=int)
    classes = ", ".join(info["classes"])
    k = recipe["training"]["k_shot"]
    own = test["with_ct" if facts["calibration"]["ct_context"] else "without_ct"]
    best = own.get(str(k), own[shots[-1]])
    return "\n".join(
        [
            *_head(name, info, k, best),
            "",
            f"# {name}",
            "",
            f"Few-shot classifier of pathology tiles ({classes}) with a patient's CT as context, "
            f"made by CDT Edge {__version__}. {NOTICE}",
            "",
            "## Data",
            "",
            f"{info['data']}; {info['layout']} layout, parted by {info['grouped_by']}. Weights "
            "may be used as the data's licence allows.",
            "",
            "## Measured on the held-out fold",
            "",
            *_table(test, shots),
            "",
            f"Mean accuracy over {_episodes(test)} episodes, with the 95 % interval over episodes. "
            "Controls stand below the model.",
            *(_folds(over_folds, shots) if over_folds else []),
            "",
            "## Limits",
            "",
            f"Trained at {facts['preprocess'].get('tile_mpp')} microns a pixel on "
            f"{len(facts['preprocess']['channels'])} channels "
            f"({', '.join(facts['preprocess']['channels'])}). Other scanners, stains and organs "
            "need a test of their own: `cdt-doctor drift`.",
            "",
            "## Use",
            "",
            "```",
            f"cdt-export --checkpoint {name} --data-dir DATA",
            "cdt-infer CT_DIR TILE",
            "```",
            "",
        ]
    )


def _head(name: str, info: Mapping[str, Any], k: int, best: Mapping[str, Any]) -> list[str]:
    """What the hub reads of a card: the kind of model, and its figures."""
    return [
        "---",
        "library_name: cdt-edge",
        "pipeline_tag: image-classification",
        "tags: [pathology, few-shot, computed-tomography, prototypical-network]",
        "model-index:",
        f"- name: {json.dumps(name)}",
        "  results:",
        "  - task: {type: image-classification, name: Few-shot tile classification}",
        f"    dataset: {{type: private, name: {json.dumps(info['data'])}}}",
        "    metrics:",
        *(
            f"    - {{type: {kind}, name: {title}, value: {best[kind]:.4f}}}"
            for kind, title in (
                ("accuracy", f"{k}-shot accuracy"),
                ("auc_roc", f"{k}-shot AUC"),
                ("ece", f"{k}-shot calibration error"),
            )
            if kind in best
        ),
        "---",
    ]


def _table(test: Mapping[str, Any], shots: list[Any]) -> list[str]:
    lines = [
        "| | " + " | ".join(f"{shot}-shot" for shot in shots) + " |",
        "|" + "---|" * (len(shots) + 1),
    ]
    for row, title in ROWS.items():
        if row in test:
            cells = [
                f"{test[row][shot]['accuracy']:.3f} ± {test[row][shot]['accuracy_ci95']:.3f}"
                for shot in shots
            ]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _folds(over_folds: Mapping[str, Any], shots: list[Any]) -> list[str]:
    lines = ["", "## Over all folds", "", f"| | {' | '.join(f'{one}-shot' for one in shots)} |"]
    lines.append("|" + "---|" * (len(shots) + 1))
    for row, title in ROWS.items():
        found = over_folds.get(row, {})
        if all(str(shot) in found for shot in shots):
            values = [found[str(shot)]["accuracy"] for shot in shots]
            cells = [f"{one['mean']:.3f} ± {one['std']:.3f}" for one in values]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [*lines, "", "Mean and standard deviation over folds."]


def _episodes(test: Mapping[str, Any]) -> int:
    first = next(iter(next(iter(test.values())).values()))
    return int(first["episodes"])
