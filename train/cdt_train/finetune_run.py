"""From a data folder to figures on the disk: one fine-tuning, or a comparison of many.

OUTPUT_DIR of a fine-tuning       finetuned.pt, metrics.json, checkpoints
OUTPUT_DIR of a comparison        compare.json, arms/*.json (one a run), ssl/ssl_backbone.pt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cdt_runtime.errors import TrainingError
from cdt_train.checkpoint import save_checkpoint, write_json
from cdt_train.compare import Bench, arms_of, compare
from cdt_train.data.labelled import LabelledArrays, read_labelled
from cdt_train.encoders.backbones import build_backbone
from cdt_train.encoders.weights import Weights, load_backbone_weights, read_weights
from cdt_train.engine import Device, Engine, Precision
from cdt_train.finetune import Mode, Plan, Tuning, fine_tune, image_shape, plan_splits
from cdt_train.progress import say
from cdt_train.views import Pretraining, pretrain_views


@dataclass(frozen=True)
class Source:
    """The data and the backbone of a command.

    Attributes:
        data: file or folder.
        layout: of the data.
        image_size: side that images are resized to, or None.
        backbone: by name, or None for the house's own.
        adapt_stem: see `load_backbone_weights`.
        dev_share: see `plan_splits`.
        test_fold: for data with numbered folds, the one that is reported.
        device: to train on.
        precision: to train in.
    """

    data: Path
    layout: str
    image_size: int | None = None
    backbone: str | None = None
    adapt_stem: bool = False
    dev_share: float = 0.0
    test_fold: str | None = None
    device: Device = "auto"
    precision: Precision = "auto"

    def read(self) -> tuple[LabelledArrays, Plan, str]:
        """Read the data, plan the splits, name the backbone; say what is known of them."""
        data = read_labelled(self.layout, self.data, image_size=self.image_size)
        if self.test_fold is not None:
            data = data.with_test_fold(self.test_fold)
        for warning in data.warnings:
            say(f"warning: {warning}")
        plan = plan_splits(data, dev_share=self.dev_share)
        say(f"data: {len(plan.train)} training images, {len(plan.test)} reported; {plan.note}")
        return data, plan, self.backbone or ("shape3d" if data.images.ndim == 5 else "conv2d")

    def config(self, data: LabelledArrays, backbone: str) -> dict[str, Any]:
        """What a run must share with the one that it resumes, beside its numbers."""
        kept = {
            "backbone": backbone,
            "image_size": self.image_size,
            "dev_share": self.dev_share,
            "test_fold": self.test_fold,
            "adapt_stem": self.adapt_stem,
            "fingerprint": data.fingerprint,
        }
        return {"source": kept}


def run_finetune(
    source: Source, tuning: Tuning, weights: Path | None, output_dir: Path, *, resume: bool
) -> dict[str, Any]:
    """Fine-tune once; returns what `metrics.json` holds.

    Raises:
        CdtError: of any kind that the user can mend.
    """
    if (output_dir / "metrics.json").is_file() and not resume:
        raise TrainingError(f"{output_dir} holds a run: --output-dir names another folder")
    data, plan, name = source.read()
    backbone = build_backbone(name, image_shape(data), seed=tuning.seed)
    if weights is not None:
        loaded = read_weights(weights)
        load_backbone_weights(backbone.net, loaded, str(weights), adapt_stem=source.adapt_stem)
    outcome = fine_tune(
        data,
        plan,
        backbone,
        tuning,
        folder=output_dir,
        config=source.config(data, name) | {"start": {"weights": str(weights)}},
        resume=resume,
        engine=Engine.start(source.device, source.precision),
    )
    found = {
        "metrics": outcome.metrics,
        "reported": plan.reported,
        "items": len(plan.test),
        "note": plan.note,
        "seconds": outcome.seconds,
        "tuning": asdict(tuning),
        **source.config(data, name),
        "history": outcome.history,
    }
    content = {
        "model_state_dict": outcome.model.state_dict(),
        "backbone": name,
        "task": data.task,
        "classes": list(data.classes),
        "channels": data.images.shape[1],
        "sides": list(data.images.shape[2:]),
        "tuning": asdict(tuning),
    }
    save_checkpoint(output_dir / "finetuned.pt", content)
    write_json(output_dir / "metrics.json", found)
    return found


def run_compare(
    source: Source,
    tuning: Tuning,
    files: Mapping[str, Path],
    output_dir: Path,
    *,
    ssl_epochs: int,
    modes: Sequence[Mode],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Compare scratch with each weights file and, with `ssl_epochs`, with our own pretraining.

    Raises:
        CdtError: of any kind that the user can mend.
    """
    pretrained: dict[str, Weights] = {name: read_weights(path) for name, path in files.items()}
    data, plan, name = source.read()
    engine = Engine.start(source.device, source.precision)
    build = partial(_built, name, data)
    config = source.config(data, name)
    if ssl_epochs > 0:
        pretrained["ssl"] = pretrain_views(
            torch.from_numpy(data.images[plan.train]),
            build(seeds[0]),
            Pretraining(epochs=ssl_epochs, seed=seeds[0]),
            folder=output_dir / "ssl",
            config=config,
            engine=engine,
        )
    bench = Bench(data, plan, build, tuning, config, output_dir, engine, source.adapt_stem)
    found = compare(bench, arms_of(pretrained), modes, seeds)
    write_json(output_dir / "compare.json", found | {"tuning": asdict(tuning), **config})
    return found


def _built(name: str, data: LabelledArrays, seed: int) -> Any:
    return build_backbone(name, image_shape(data), seed=seed)
