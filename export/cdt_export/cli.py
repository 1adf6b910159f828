"""`cdt-export`. Only this module reads options; heavy imports wait for the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import run

if TYPE_CHECKING:
    from cdt_export.weight_only import Quantize
    from cdt_runtime.bundle import Bundle

EXAMPLES = """
\b
Examples:
  cdt-export --fp16                         from models/best_model.pt
  cdt-export --int8                         for a CPU: int8 where it gains
  cdt-export --sign private.pem             for cdt-infer --trust public.pem
  cdt-export --checkpoint out/best_model.pt --output engines/lung
  cdt-export --triton repository            and Triton's model repository
  cdt-export --bundle engines/lung --triton repository
  cdt-export --encoders medsiglip,path-foundation --quantize int8

\b
The prototypes are made from support tiles of the training data, and the
proof runs on its held-out tiles: that data must be at hand (--data-dir, if
it has moved). Ends with a parity table; a bundle that does not decide as the
model is not written, and the exit code is 2.
With --int8 an encoder is in int8 only if it is faster in every CPU engine
that is installed here and the decisions stay; the last lines say which are,
and why the others are not. Calibrated on training tiles and CT.
Research use only: not a medical device.
"""


@click.command(
    "cdt-export", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--checkpoint", metavar="FILE", default="models/best_model.pt", show_default=True)
@click.option(
    "--output", metavar="DIR", help="The bundle.  [default: engines/DATA-Kshot-PRECISION]"
)
@click.option("--fp16", is_flag=True, help="Compute in float16: half the size, faster on a GPU.")
@click.option("--int8", is_flag=True, help="Encoders in int8 where they gain: faster on a CPU.")
@click.option(
    "--quantize",
    type=click.Choice(["none", "fp16", "int8", "int8-qdq", "int4", "nf4"]),
    default="none",
    show_default=True,
    help="Weights of foundation encoders; int8-qdq is for TensorRT.",
)
@click.option(
    "--encoders", metavar="KEY,...", help="Export these encoders alone, without a checkpoint."
)
@click.option(
    "--weights", multiple=True, metavar="KEY=PATH", help="Of --encoders; or KEY=tiny-random."
)
@click.option(
    "--tiles", metavar="DIR", help="CLASS/* tiles: how --encoders change few-shot accuracy."
)
@click.option("--sign", metavar="KEY", help="Sign the bundle with this Ed25519 private key (PEM).")
@click.option("--triton", metavar="DIR", help="Also a model repository of Triton, checked.")
@click.option("--bundle", metavar="DIR", help="With --triton: of this bundle, without export.")
@click.option("--data-dir", metavar="DIR", help="Where the training data is now, if it has moved.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest in place of the table.")
@click.version_option(__version__, prog_name="cdt-export")
def export_command(
    checkpoint: str,
    output: str | None,
    fp16: bool,
    int8: bool,
    quantize: Quantize,
    encoders: str | None,
    weights: tuple[str, ...],
    tiles: str | None,
    sign: str | None,
    triton: str | None,
    bundle: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Turn a trained model into a bundle that runs without PyTorch.

    The bundle holds the ONNX graphs, the class prototypes and everything that
    cdt-infer needs, each file with its hash.
    """
    from cdt_runtime.bundle import Bundle

    if fp16 and int8:
        raise click.UsageError("--fp16 and --int8: give one, --fp16 for a GPU or --int8 for a CPU")
    if sign and encoders is not None:
        raise click.UsageError("--sign: for bundles, not with --encoders")
    if triton and encoders is not None:
        raise click.UsageError("--triton: for bundles, not with --encoders")
    if bundle is not None:
        if not triton:
            raise click.UsageError("--bundle: only with --triton")
        _write_triton(Bundle.open(bundle), Path(triton), as_json)
        return
    if encoders is not None:
        _export_encoders(encoders, quantize, weights, tiles, output, as_json)
        return
    if weights or tiles:
        raise click.UsageError("--weights and --tiles: only with --encoders")
    if triton:
        import tritonclient  # noqa: F401  missing, it must be said before minutes of work
    from cdt_export.build import export_bundle
    from cdt_export.int8_choice import choice_text
    from cdt_export.report import parity_text
    from cdt_runtime.signing import signer
    from cdt_train.trained import load_trained

    seal = signer(Path(sign)) if sign else None  # a key that can't be used is said before the work
    precision = "fp16" if fp16 else "int8" if int8 else "fp32"
    trained = load_trained(Path(checkpoint))
    data = "phantom" if trained.info["phantom"] else trained.info["layout"]
    name = f"{data}-{trained.recipe.training.k_shot}shot-{precision}"
    made = export_bundle(
        trained,
        Path(output) if output else Path("engines") / name,
        precision=precision,
        data_dir=Path(data_dir) if data_dir else None,
        quantize=quantize,
        sign=seal,
    )
    if as_json:
        click.echo(json.dumps(made.manifest, indent=1))
    else:
        size = sum(entry["bytes"] for entry in made.manifest["files"].values())
        click.echo(parity_text(made.manifest["parity"]))
        if int8:
            click.echo("\n" + choice_text(made.manifest["int8"]))
        click.echo(f"\nbundle    {made.path} ({precision}, {size / 1e6:.1f} MB, {made.identity})")
        click.echo(f"trained   on {made.manifest['training']['data']}")
        click.echo(f"next      cdt-infer CT_DIR TILE --bundle {made.path}")
    if triton:
        _write_triton(made, Path(triton), as_json)


def _write_triton(bundle: Bundle, folder: Path, as_json: bool) -> None:
    """Write a model repository of Triton, and say what it was checked by."""
    from cdt_export.triton import ENSEMBLE, MAX_BATCH, write_triton

    gaps = write_triton(bundle, folder)
    if as_json:
        click.echo(json.dumps({"triton": str(folder), "ensemble_gaps": gaps}))
        return
    told = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
    click.echo(f"triton    {folder}: model {ENSEMBLE}, up to {MAX_BATCH} tiles a call")
    click.echo(f"checked   configurations against graphs; the ensemble's steps: off by {told}")
    click.echo(f"next      tritonserver --model-repository={folder}")


def _export_encoders(
    keys: str,
    method: Quantize,
    weights: tuple[str, ...],
    tiles: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Export foundation encoders alone, each to a folder of its own."""
    from cdt_export.foundation import (
        export_encoder,
        few_shot_change,
        labelled_tiles,
        write_encoder,
    )
    from cdt_export.report import encoders_text
    from cdt_train.encoders.registry import load_encoder

    names = [key.strip() for key in keys.split(",")]
    given = _given(weights, names)
    labelled = labelled_tiles(Path(tiles)) if tiles else None
    reports = []
    for key in names:
        encoder = load_encoder(key, given.get(key))
        exported = export_encoder(encoder, method)
        if labelled:
            exported.report["few_shot"] = few_shot_change(encoder, exported, labelled)
        root = Path(output) if output else Path("engines") / "encoders"
        folder = root / f"{exported.card.graph}-{method if method != 'none' else 'fp32'}"
        write_encoder(exported, folder)
        reports.append({**exported.report, "folder": str(folder)})
    click.echo(json.dumps(reports, indent=1) if as_json else encoders_text(reports))


def _given(weights: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """Take KEY=PATH apart.

    Raises:
        click.UsageError: it is not of that form, or of no encoder that is to be exported.
    """
    given: dict[str, str] = {}
    for pair in weights:
        key, _, path = pair.partition("=")
        if not path:
            raise click.UsageError(f"--weights {pair!r}: expected KEY=PATH, or KEY=tiny-random")
        if key not in names:
            raise click.UsageError(
                f"--weights {pair!r}: {key} is not among --encoders {','.join(names)}: add it there"
            )
        given[key] = path
    return given


def main() -> NoReturn:
    """Entry point of `cdt-export`."""
    run(export_command, extra="export")
