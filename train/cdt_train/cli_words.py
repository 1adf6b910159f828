"""`cdt-train zero-shot` and `describe`: what encoders that know words say, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cdt_runtime.console import one_line, say
from cdt_runtime.errors import InputError

NOTICE = "Research use only: not a medical device."
TILES_EXAMPLE = f"""
\b
Example:
  cdt-train zero-shot TILES --class "tumour=H&E of lung adenocarcinoma" \\
    --class "normal=H&E of normal lung"

{NOTICE}
"""
CT_EXAMPLE = f"""
\b
Example:
  cdt-train describe CT_DIR --question "Is there a nodule?"

{NOTICE}
"""
SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.command("zero-shot", epilog=TILES_EXAMPLE, context_settings=SETTINGS)
@click.argument("tiles", nargs=-1, required=True)
@click.option(
    "--class",
    "classes",
    multiple=True,
    required=True,
    metavar="NAME=TEXT",
    help="A class and its description; twice or more.",
)
@click.option("--encoder", default="medsiglip", show_default=True, help="Or medsiglip@OPTION.")
@click.option("--weights", type=click.Path(path_type=Path), help="Where they are not looked for.")
@click.option("--json", "as_json", is_flag=True, help="Print one object a tile.")
def zero_shot_command(
    tiles: tuple[str, ...],
    classes: tuple[str, ...],
    encoder: str,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Score RGB tiles, or those of a folder, against classes in words, with MedSigLIP.

    A probability is that of image and description agreeing, each for itself:
    they need not add up to one. No tile has been learnt from, and none of it
    is calibrated: hold it against labelled tiles before you believe it.
    """
    from cdt_runtime.encoders import rgb_bytes
    from cdt_runtime.reading import read_tile
    from cdt_runtime.tile import RGB
    from cdt_runtime.tile_folder import tiles_under
    from cdt_train.encoders.medsiglip_text import load_zero_shot

    named = _described(classes)
    paths = [path for given in tiles for path in tiles_under(given, RGB, None)]
    model = load_zero_shot(encoder, weights)
    texts = model.describe(list(named.values()))
    facts = {"encoder": model.card.key, "weights_sha256": model.card.weights_sha256}
    failed = False
    for path in paths:
        try:
            tile = read_tile(Path(path))
            pixels = rgb_bytes(tile.pixels, tile.bits, tile.channels, path, whole=True)
        except InputError as error:
            failed = True
            say(error)
            if as_json:
                click.echo(json.dumps({"tile": path, "error": one_line(error)}))
            continue
        (chances,) = model.probabilities([pixels], texts)
        scores = dict(zip(named, map(float, chances), strict=True))
        best = max(scores, key=lambda name: scores[name])
        if as_json:
            found = {"tile": path, "nearest": best, "probabilities": scores, **facts}
            click.echo(json.dumps(found))
        else:
            shown = "  ".join(f"{name} {chance:.3f}" for name, chance in scores.items())
            click.echo(f"{path}  {best}  ({shown})")
    sys.exit(InputError.exit_code if failed else 0)


@click.command("describe", epilog=CT_EXAMPLE, context_settings=SETTINGS)
@click.argument("ct_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--question", help="In place of what the scan shows.")
@click.option("--weights", type=click.Path(path_type=Path), help="Where they are not looked for.")
@click.option("--bf16", is_flag=True, help="Not in 4 bits: 9 GB of memory in place of 3.")
@click.option("--features", metavar="FILE.npy", help="Keep features in place of an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the text.")
def describe_command(
    ct_dir: str,
    question: str | None,
    weights: Path | None,
    bf16: bool,
    features: str | None,
    as_json: bool,
) -> None:
    """Ask MedGemma about a CT series, in words.

    The whole model is loaded, in 4 bits: for a workstation, and minutes on a
    CPU. What it says is a language model's text, not a finding. --features
    keeps the mean of its last layer over the slices, (2560,) float32.
    """
    import numpy as np

    from cdt_runtime.cache import TokenCache, cache_dir
    from cdt_runtime.reading import scan_series
    from cdt_train.encoders.look_up import require_weights
    from cdt_train.encoders.medgemma_text import QUESTION, load_language_model, load_processor
    from cdt_train.encoders.registry import entry_of

    if features and question:
        raise click.UsageError("--features and --question: give one")
    series = scan_series(ct_dir)
    entry = entry_of("medgemma")
    path = require_weights(entry, weights)
    model = load_language_model(path, entry.card, quantised=not bf16)
    hu = series.volume().hu
    found: dict[str, Any] = {"ct": series.description, "weights_sha256": model.weights_sha256}
    found |= {"precision": "bf16" if bf16 else "nf4"}
    if features:
        kept = model.semantic_features(hu, series.state, TokenCache(cache_dir()))
        np.save(features, kept)
        said = f"{features}: {kept.shape[0]} features"
        found |= {"features": features, "shape": list(kept.shape)}
    else:
        asked = question or QUESTION
        said = model.describe(hu, load_processor(path), asked)
        found |= {"question": asked, "answer": said}
    click.echo(json.dumps(found) if as_json else said)


def _described(classes: tuple[str, ...]) -> dict[str, str]:
    """Take NAME=TEXT apart.

    Raises:
        click.UsageError: it is not of that form, or there are fewer than two.
    """
    named: dict[str, str] = {}
    for one in classes:
        name, mark, text = one.partition("=")
        if not (mark and name.strip() and text.strip()) or name in named:
            raise click.UsageError(f"--class {one!r}: expected NAME=TEXT, each name once")
        named[name] = text
    if len(named) < 2:
        raise click.UsageError("--class: give it for two classes or more")
    return named
