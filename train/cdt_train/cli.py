"""`cdt-train`. Only this module reads options; heavy imports wait for the work."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import run

EXAMPLES = """
\b
Examples:
  cdt-train --kshot 5                      on phantom data, a few minutes
  cdt-train --kshot 5 --data-dir DATA --output-dir out
  cdt-train --config my.yaml training.num_epochs=30 --resume

\b
Other commands; each has --help:
  cdt-train evaluate MODEL                 a checkpoint or a bundle, once more
  cdt-train finetune DATA --layout NAME    a backbone on labelled images
  cdt-train compare DATA --layout NAME     pretrained starts, with controls
  cdt-train encoders                       which foundation encoders are here
  cdt-train save-pretrained MODEL DIR      in the hub's format, with a card
  cdt-train convert path-foundation DIR    SavedModel to ONNX, once
  cdt-train zero-shot TILE --class A=TEXT  classes in words, by MedSigLIP
  cdt-train describe CT_DIR                a CT in words, by MedGemma

\b
DATA holds
  ct_data/PATIENT/.../*.dcm               one CT series a folder
  pathology_data/PATIENT/REGION/          one file a marker, or one image file
  labels.csv                              patient,region,label or path,label
or, in place of labels.csv, class folders: pathology_data/CLASS/*.tif

\b
Writes best_model.pt, metrics.json and curves to the output folder.
Research use only: not a medical device.
"""


COMMANDS = {
    "evaluate": "cdt_train.cli_evaluate:evaluate_command",
    "finetune": "cdt_train.cli_finetune:finetune_command",
    "compare": "cdt_train.cli_finetune:compare_command",
    "encoders": "cdt_train.cli_encoders:encoders_command",
    "save-pretrained": "cdt_train.cli_hub:save_pretrained_command",
    "convert": "cdt_train.cli_encoders:convert_command",
    "zero-shot": "cdt_train.cli_words:zero_shot_command",
    "describe": "cdt_train.cli_words:describe_command",
}
"""What the first argument may name in place of an option or a KEY=VALUE."""


class TrainCommand(click.Command):
    """Trains, unless the first argument names another command."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse the arguments, by the command that they are for."""
        if not args or args[0] not in COMMANDS:
            return super().make_context(info_name, args, parent, **extra)
        module, _, name = COMMANDS[args[0]].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments are for."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(
    "cdt-train",
    cls=TrainCommand,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--kshot", type=click.IntRange(min=1), help="Support tiles a class.  [default: 5]")
@click.option("--config", metavar="FILE", help="Recipe (YAML); see configs/default.yaml.")
@click.option("--data-dir", metavar="DIR", help="Your data.  [default: generated phantom data]")
@click.option("--ct-dir", metavar="DIR", help="CT series that lie elsewhere.")
@click.option("--output-dir", metavar="DIR", default="models", show_default=True)
@click.option("--num-folds", type=click.IntRange(min=2), help="Folds by patient.  [default: 3]")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json in place of the table.")
@click.version_option(__version__, prog_name="cdt-train")
def train_command(
    overrides: tuple[str, ...],
    kshot: int | None,
    config: str | None,
    data_dir: str | None,
    ct_dir: str | None,
    output_dir: str,
    num_folds: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a few-shot tile classifier with CT as context, and evaluate it.

    Phase 1 pretrains the CT encoder without labels, phase 2 the tile encoder;
    phase 3 trains the whole model on few-shot episodes. Folds are by patient.
    """
    from cdt_train.config import load_recipe

    shorthand = {"training.k_shot": kshot, "training.num_folds": num_folds}
    pairs = [f"{key}={value}" for key, value in shorthand.items() if value is not None]
    recipe = load_recipe(Path(config) if config else None, [*overrides, *pairs])

    from cdt_train.progress import is_silent
    from cdt_train.run import run_training
    from cdt_train.summary import as_text

    output = Path(output_dir)
    report = run_training(
        recipe,
        data_dir=Path(data_dir) if data_dir else None,
        ct_dir=Path(ct_dir) if ct_dir else None,
        output_dir=output,
        resume=resume,
    )
    if is_silent():
        return
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    click.echo(as_text(report))
    click.echo(f"\nmodel     {output / 'best_model.pt'} (fold {report['best_fold']})")
    click.echo(f"report    {output / 'report.html'}, figures in {output / 'metrics.json'}")
    click.echo(f"next      cdt-export --checkpoint {output / 'best_model.pt'} --fp16")


def main() -> NoReturn:
    """Entry point of `cdt-train`."""
    if "RANK" in os.environ:  # torch would remark on parts of the model that a step leaves out
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run(train_command, extra="train")


if __name__ == "__main__":
    main()
