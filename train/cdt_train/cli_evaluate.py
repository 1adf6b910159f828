"""`cdt-train evaluate`. Heavy imports wait for the work."""

from __future__ import annotations

import json
from pathlib import Path

import click

EXAMPLES = """
\b
Examples:
  cdt-train evaluate models/best_model.pt
  cdt-train evaluate engines/NAME --data-dir DATA --kshot 1 --kshot 5
  cdt-train evaluate models/best_model.pt --data-dir OTHER --layout csv

\b
Research use only: not a medical device.
"""


@click.command(
    "evaluate", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--data-dir", metavar="DIR", type=click.Path(path_type=Path), help="The data.")
@click.option("--ct-dir", metavar="DIR", type=click.Path(path_type=Path), help="Its CT series.")
@click.option("--layout", metavar="NAME", help="Of the data.  [default: that of the training]")
@click.option(
    "--kshot", "shots", type=click.IntRange(min=1), multiple=True, help="Support tiles; repeat."
)
@click.option("--episodes", type=click.IntRange(min=2), help="Of each K.  [default: the recipe's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def evaluate_command(
    model: Path,
    data_dir: Path | None,
    ct_dir: Path | None,
    layout: str | None,
    shots: tuple[int, ...],
    episodes: int | None,
    as_json: bool,
) -> None:
    """Evaluate MODEL, a checkpoint (best_model.pt) or the folder of a bundle.

    On the data that it was trained on these are its own test tiles, in the
    episodes of its fold. On other data, of any classes with the same channels,
    all tiles are test tiles. A bundle takes --data-dir.
    """
    from cdt_train.evaluate_run import as_text, run_evaluation

    report = run_evaluation(
        model, data_dir=data_dir, ct_dir=ct_dir, layout=layout, shots=shots, count=episodes
    )
    click.echo(json.dumps(report, indent=1) if as_json else as_text(report))
