"""`cdt-train encoders`: what there is, what of it is ready here, and why the rest is not."""

from __future__ import annotations

import json
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
