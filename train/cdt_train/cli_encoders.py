"""`cdt-train encoders` lists what there is; `cdt-train convert` is needed once, for one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cdt_train.encoders.entry import Entry


@click.command("encoders")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def encoders_command(as_json: bool) -> None:
    """List the foundation encoders, with what is ready on this machine.

    Nothing is loaded and no network is asked. Weights are looked for in
    $CDT_WEIGHTS/KEY, then in the cache of the Hugging Face hub.
    """
    from cdt_train.encoders.registry import ENCODERS

    found = [_facts(entry) for entry in ENCODERS.values()]
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    width = max(len(one["key"]) for one in found)
    for one in found:
        size = f"{one['embedding_dim']}"
        head = f"{one['key']:{width}}  {one['modality']:4}  {size:>5}  {one['status']}"
        click.echo(f"{head}: {one['cure']}" if one["cure"] else f"{head}: {one['path']}")
    click.echo(
        "\nkey, what it looks at, width of its embedding, state; licences and sources: --json"
    )


@click.command("convert")
@click.argument("encoder", type=click.Choice(["path-foundation"]))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="The ONNX file.  [default: inside FOLDER]"
)
def convert_command(encoder: str, folder: Path, output: Path | None) -> None:
    """Turn the SavedModel of ENCODER in FOLDER into ONNX, and compare both.

    Needs TensorFlow and tf2onnx: pip install 'cdt-edge[tensorflow]'. Training,
    export and inference then work without either.
    """
    from cdt_train.encoders.path_foundation import ONNX
    from cdt_train.encoders.saved_model import convert

    path = output or folder / ONNX
    gap = convert(folder, path)
    click.echo(f"{encoder}: {path}, differs from TensorFlow by at most {gap:.1e}")


def _facts(entry: Entry) -> dict[str, Any]:
    from cdt_train.encoders.look_up import availability

    card, state = entry.card, availability(entry)
    return {
        "key": card.key,
        "title": card.title,
        "modality": card.modality,
        "source": card.source,
        "licence": card.licence,
        "licence_url": card.licence_url,
        "gated": card.gated,
        "commercial": card.commercial,
        "embedding_dim": card.embedding_dim,
        "token_dim": card.token_dim,
        "verified": card.verified,
        "status": state.status,
        "reason": state.reason,
        "cure": state.cure,
        "path": str(state.path) if state.path else None,
    }
