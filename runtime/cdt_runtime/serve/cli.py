"""The command `cdt-serve`; heavy imports wait for the work."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cdt_runtime import __version__
from cdt_runtime.console import one_line, run
from cdt_runtime.errors import InputError

if TYPE_CHECKING:
    from cdt_runtime.backends import Precision

VARIABLE = "CDT_SERVE_TOKEN"
LEAST_TOKEN = 16
BACKLOG = 512
"""Connections that may wait to be taken."""

OPEN_DOOR = "not encrypted, and open to other machines: put a proxy before it that speaks TLS"

EXAMPLES = f"""
\b
Examples:
  cdt-serve                              the page, on this machine alone
  cdt-serve --ct-root ct/                and the CTs below ct/, a folder each
  curl -H "Authorization: Bearer $TOKEN" -F tile=@tile.tif -F ct=R_001 \\
    http://127.0.0.1:8765/v1/classify

\b
Every request but for the page itself needs the token: that of --token-file or
{VARIABLE}, else a new one each time, which the first line shows.
Traffic is not encrypted: beyond this machine put a proxy with TLS before it.
/docs describes the paths, /metrics is for Prometheus, /health/ready for
whoever restarts it. SIGTERM lets requests that are being answered end.
Research use only: not a medical device.
"""


def serve() -> NoReturn:
    """Entry point of `cdt-serve`."""
    run(serve_command, extra="serve")


@click.command(
    "cdt-serve", epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--bundle", metavar="DIR", help="Bundle folder.  [default: the newest in ./engines]")
@click.option("--ct-root", metavar="DIR", help="Folder of CTs, a folder each: requests name them.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True)
@click.option("--token-file", metavar="FILE", help="File whose first line is the token.")
@click.option("--read-only", is_flag=True, help="No class can be enrolled.")
@click.option(
    "--max-mb", type=click.IntRange(1, 4096), default=64, show_default=True, help="Of an upload."
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0.1, 3600),
    default=30.0,
    show_default=True,
    help="Until a request is answered.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    help="Requests that are being answered; more are told to try again.",
)
@click.option("--audit", metavar="FILE", help="Also a line an answer in an append-only log.")
@click.option("--trust", metavar="KEY", help="Refuse a bundle that this public key did not sign.")
@click.option("--backend", default="auto", show_default=True, help="As of cdt-infer.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32"]),
    default="auto",
    show_default=True,
    help="As of cdt-infer.",
)
@click.version_option(__version__, prog_name="cdt-serve")
def serve_command(
    bundle: str | None,
    ct_root: str | None,
    host: str,
    port: int,
    token_file: str | None,
    read_only: bool,
    max_mb: int,
    timeout_s: float,
    at_once: int,
    audit: str | None,
    trust: str | None,
    backend: str,
    precision: Precision,
) -> None:
    """Answer over HTTP: upload a tile, name a CT, get what cdt-infer says."""
    from cdt_runtime.serve.listen import Service, listen

    root = Path(ct_root) if ct_root is not None else None
    if root is not None and not root.is_dir():
        raise InputError(f"--ct-root {root}: no such folder: give the folder of the CTs' folders")
    token, is_new = _token(token_file)
    door = _bound(host, port)
    with door:
        service = Service(
            bundle=bundle,
            scans=root,
            token=token,
            read_only=read_only,
            max_bytes=max_mb << 20,
            seconds=timeout_s,
            at_once=at_once,
            audit=audit,
            trust=trust,
            backend=backend,
            precision=precision,
        )
        shown, bound = door.getsockname()[:2]
        where = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}/"

        def ready(notes: Sequence[str]) -> None:
            known = () if _is_loopback(shown) else (OPEN_DOOR,)
            for note in (*notes, *known):
                click.echo(f"note: {one_line(note)}", err=True)
            click.echo(f"listening on {where}{f'#token={token}' if is_new else ''}", err=True)

        listen(service, door, ready)


def _token(path: str | None) -> tuple[str, bool]:
    """Return the token, and whether it was made just now."""
    if path is not None:
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {path}: can't be read ({error})") from error
        token, source = text.partition("\n")[0].strip(), f"--token-file {path}"
    elif VARIABLE in os.environ:
        token, source = os.environ[VARIABLE].strip(), VARIABLE
    else:
        return secrets.token_urlsafe(24), True
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"{source}: the token needs at least {LEAST_TOKEN} letters, digits or signs, without "
            "spaces"
        )
    return token, False


def _bound(host: str, port: int) -> socket.socket:
    """Take the port now: one that is taken is said before the model is loaded.

    Raises:
        InputError: the address is not of this machine, or the port is taken.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, asyncio sends small answers at once: 40 ms less a request.
        with ExitStack() as closing:
            door = closing.enter_context(socket.socket(family, kind, proto))
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
            door.listen(BACKLOG)
            closing.pop_all()
        return door
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: can't listen there ({error.strerror}): give another"
        ) from error


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback
