"""`cdt-train finetune` and `cdt-train compare`. Heavy imports wait for the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cdt_runtime.errors import RecipeError

if TYPE_CHECKING:
    from cdt_train.finetune import Mode, Tuning

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("linear", "full", "frt")

EXAMPLES = """
\b
Examples:
  cdt-train compare adrenalmnist3d_64.npz --layout medmnist --image-size 32 \\
      --epochs 12 --learning-rate 3e-3 --ema-decay 0.98 --tta --ssl --ssl-epochs 8
  cdt-train compare TILES --layout image_folders --image-size 224 \\
      --backbone timm:resnet18 --weights imagenet=resnet18.safetensors \\
      --modes linear,full,frt

\b
Choose settings with --dev-share 0.2 first: val and test then stay untouched.
"""

DATA_OPTIONS = (
    click.argument("data", metavar="DATA", type=click.Path(path_type=Path)),
    click.option("--layout", required=True, help="How DATA is laid out, such as medmnist."),
    click.option("--image-size", type=click.IntRange(min=8), help="Resize images to this side."),
    click.option(
        "--backbone",
        help="conv2d, conv3d, shape3d, timm:NAME, monai:NAME or transformers:FOLDER.  "
        "[default: conv2d for tiles, shape3d for volumes]",
    ),
    click.option("--adapt-stem", is_flag=True, help="Let weights for 3 channels fit 1, and back."),
    click.option(
        "--dev-share",
        type=click.FloatRange(0, 0.9),
        default=0.0,
        help="Hold out this share of train and report it: to choose settings, val and test "
        "untouched.",
    ),
    click.option("--test-fold", metavar="FOLD", help="Of data with numbered folds: report it."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto"
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table."),
)

TUNING_OPTIONS = (
    click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True),
    click.option("--batch-size", type=click.IntRange(min=2), default=32, show_default=True),
    click.option("--learning-rate", type=float, default=2e-3, show_default=True),
    click.option("--weight-decay", type=float, default=0.05, show_default=True),
    click.option("--warmup", type=click.FloatRange(0, 0.9), default=0.1, show_default=True),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "plateau"]),
        default="cosine",
        show_default=True,
        help="plateau lowers the rate when val stands still.",
    ),
    click.option("--patience", type=click.IntRange(min=0), default=0, help="0: no early stop."),
    click.option("--ema-decay", type=click.FloatRange(0, 0.9999), default=0.99, show_default=True),
    click.option("--label-smoothing", type=click.FloatRange(0, 0.5), default=0.0),
    click.option("--class-weights", is_flag=True, help="Let every class count alike."),
    click.option("--augment/--no-augment", default=True, show_default=True),
    click.option("--tta", is_flag=True, help="Average over mirrored test images."),
)


def _with(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("finetune")
@_with(*DATA_OPTIONS)
@click.option("--mode", type=click.Choice(MODES), default="full", show_default=True)
@click.option("--weights", metavar="FILE", help="Of the backbone: safetensors or torch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--output-dir", metavar="DIR", default="models/finetune", show_default=True)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@_with(*TUNING_OPTIONS)
def finetune_command(
    weights: str | None, output_dir: str, resume: bool, as_json: bool, **options: Any
) -> None:
    """Fine-tune a backbone on labelled images, tiles or volumes, and evaluate it.

    linear: the backbone is frozen. full: everything learns. frt: first a
    transfer module and the classifier on the frozen backbone, then everything
    at a tenth of the rate.
    """
    from cdt_train.finetune_run import Source, run_finetune

    source, tuning = _source(Source, options), _tuning(options, options["mode"], options["seed"])
    found = run_finetune(
        source, tuning, Path(weights) if weights else None, Path(output_dir), resume=resume
    )
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, figure in found["metrics"].items():
        click.echo(f"{name:18} {_shown(figure)}")
    click.echo(f"\n{found['items']} images of {found['reported']}; {found['note']}")
    click.echo(f"model     {Path(output_dir) / 'finetuned.pt'}")


@click.command("compare", epilog=EXAMPLES)
@_with(*DATA_OPTIONS)
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="A pretrained start; repeat.")
@click.option("--ssl", is_flag=True, help="Add our own pretraining on the training images.")
@click.option("--ssl-epochs", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--modes", default="full", show_default=True, help="Of linear, full, frt.")
@click.option("--output-dir", metavar="DIR", default="models/compare", show_default=True)
@_with(*TUNING_OPTIONS)
def compare_command(
    weights: tuple[str, ...],
    ssl: bool,
    ssl_epochs: int,
    seeds: str,
    modes: str,
    output_dir: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare training from scratch with pretrained starts, and these permuted.

    Every start has the same splits, seeds and steps. Finished runs in the
    output folder are taken up, so an interrupted comparison goes on.
    """
    chosen, numbers = _modes(modes), _seeds(seeds)
    files = _named_files(weights)

    from cdt_train.compare import as_text
    from cdt_train.finetune_run import Source, run_compare

    found = run_compare(
        _source(Source, options),
        _tuning(options, "full", 0),
        files,
        Path(output_dir),
        ssl_epochs=ssl_epochs if ssl else 0,
        modes=chosen,
        seeds=numbers,
    )
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found))


def _source(kind: Callable[..., Any], options: dict[str, Any]) -> Any:
    names = (
        "data",
        "layout",
        "image_size",
        "backbone",
        "adapt_stem",
        "dev_share",
        "test_fold",
        "device",
        "precision",
    )
    return kind(**{name: options[name] for name in names})


def _tuning(options: dict[str, Any], mode: Mode, seed: int) -> Tuning:
    from dataclasses import fields

    from cdt_train.finetune import Tuning

    given = {field.name: options[field.name] for field in fields(Tuning) if field.name in options}
    return Tuning(**(given | {"mode": mode, "seed": seed}))


def _modes(text: str) -> list[Mode]:
    chosen = [mode.strip() for mode in text.split(",")]
    for mode in chosen:
        if mode not in MODES:
            raise RecipeError(f"--modes: {mode!r} is none of {', '.join(MODES)}")
    return chosen  # type: ignore[return-value]


def _seeds(text: str) -> list[int]:
    seeds = [int(seed) for seed in text.split(",") if seed.strip().isdecimal()]
    if len(seeds) != len(text.split(",")) or len(set(seeds)) != len(seeds):
        raise RecipeError(f"--seeds: {text!r}: expected different whole numbers, such as 0,1,2")
    return seeds


def _named_files(pairs: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise RecipeError(f"--weights {pair}: expected NAME=PATH, such as imagenet=weights.pt")
        if name in files or name in ("scratch", "ssl"):
            raise RecipeError(f"--weights {pair}: the name {name} is taken: give another")
        files[name] = Path(path)
    return files


def _shown(figure: dict[str, float | None]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None or low is None or high is None:
        return "not defined by these data"
    return f"{value:.3f}  [{low:.3f}, {high:.3f}]"
