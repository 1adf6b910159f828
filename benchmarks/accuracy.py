"""What the models reach, measured anew: `python benchmarks/accuracy.py [PART ...]`.

Each part runs commands that anyone can type, writes `benchmarks/results/PART.json` and renews the
tables of the README. A part that was stopped goes on where it was.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import accuracy_parts
import accuracy_tables
import click
from records import README, read_results, with_block, write_result

PARTS = {
    "lung": accuracy_parts.lung,
    "lung_seeds": accuracy_parts.lung_seeds,
    "few_labels": accuracy_parts.few_labels,
    "novel_class": accuracy_parts.novel_class,
    "control": accuracy_parts.control,
    "ct_probe": accuracy_parts.ct_probe,
    "shape3d": accuracy_parts.shape3d,
}


class Bench:
    """Where a part reads and works, and the commands that it ran.

    Attributes:
        data: the folder with pathology/, ct/ and shape3d/.
        work: models and data sets go there, a folder a part.
        commands: run so far.
        pretrained: by seed, what phase 1 made for the lung tiles.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.commands: list[str] = []
        self.pretrained: dict[int, Path] = {}

    def train(self, *words: str | Path) -> str:
        """Run `cdt-train`; its progress goes to the terminal, and what it prints comes back.

        Raises:
            click.ClickException: it failed.
        """
        line = [str(word) for word in words]
        shown = shlex.join(["cdt-train", *line])
        for folder, short in (
            (self.work.parent, "WORK"),
            (self.data, "DATA"),
            (README.parent, "."),
        ):
            shown = shown.replace(str(folder), short)
        self.commands.append(shown)
        click.echo(f"$ {shown}", err=True)
        started = [sys.executable, "-m", "cdt_train.cli", *line]
        done = subprocess.run(started, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise click.ClickException(f"{shown}: exit code {done.returncode}")
        return done.stdout


def accuracy_block() -> str:
    """What the README says of each part that has been measured."""
    results = read_results()
    parts = [
        f"**{accuracy_tables.TITLES[name]}** ({results[name]['date']})\n\n"
        f"{accuracy_tables.TABLES[name](results[name]['figures'])}\n"
        for name in PARTS
        if name in results
    ]
    return "".join(f"\n{part}" for part in parts) + ("\n" if parts else "")


def renew_readme() -> None:
    """Write what the results at hand say into the README."""
    text = with_block(README.read_text("utf-8"), "accuracy", accuracy_block())
    README.write_text(text, "utf-8")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS]), metavar="[PART ...]")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("../shared/data"),
    show_default=True,
    help="The folder with pathology/, ct/ and shape3d/.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models/accuracy"),
    show_default=True,
    help="Where models go; a part that was stopped goes on there.",
)
@click.option("--tables", is_flag=True, help="Only renew the README from the results at hand.")
def main(parts: tuple[str, ...], data: Path, work: Path, tables: bool) -> None:
    """Measure PARTs (all, if none is named): lung, lung_seeds, few_labels, novel_class, control,
    ct_probe, shape3d.
    """
    for name in () if tables else parts or PARTS:
        bench, started = Bench(data.resolve(), work.resolve() / name), time.monotonic()
        bench.work.mkdir(parents=True, exist_ok=True)
        figures = PARTS[name](bench)
        path = write_result(name, bench.commands, time.monotonic() - started, figures)
        click.echo(f"{name}: {path}")
    renew_readme()


if __name__ == "__main__":
    main()
