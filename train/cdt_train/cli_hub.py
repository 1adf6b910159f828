"""`cdt-train save-pretrained`. Heavy imports wait for the work."""

from __future__ import annotations

import json
from pathlib import Path

import click

EXAMPLES = """
\b
Examples:
  cdt-train save-pretrained models/best_model.pt lung-fewshot
  hf upload NAME/lung-fewshot lung-fewshot
  cdt-train save-pretrained models/best_model.pt mine --with-names
  cdt-export --checkpoint mine --data-dir DATA

\b
The folder holds config.json, model.safetensors and a model card with what was
measured; no path of this machine, and without --with-names no name of a tile
or patient. Nothing is sent anywhere. Weights may be shared as far as the
training data allows.
"""


@click.command("save-pretrained", epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--with-names",
    is_flag=True,
    help="Keep the split, in names of tiles and patients' folders: cdt-export needs it.",
)
def save_pretrained_command(checkpoint: Path, folder: Path, with_names: bool) -> None:
    """Write a finished model in the format of the Hugging Face hub."""
    from cdt_train.checkpoint import load_checkpoint
    from cdt_train.hub import CARD, CONFIG, WEIGHTS, save_pretrained
    from cdt_train.trained import NEEDED

    content = load_checkpoint(checkpoint, NEEDED)
    report = checkpoint.parent / "metrics.json"
    over_folds = None
    if report.is_file():
        found = json.loads(report.read_text("utf-8"))
        same = found.get("fingerprint") == content["dataset_info"].get("fingerprint")
        over_folds = found.get("over_folds") if same else None
    save_pretrained(content, folder, over_folds, with_names=with_names)
    click.echo(f"written   {folder}: {CONFIG}, {WEIGHTS}, {CARD}")
    click.echo(f"next      hf upload NAME/{folder.name} {folder}")
