"""The service from its start to its end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cdt_runtime.audit import AuditLog
from cdt_runtime.backends import Precision
from cdt_runtime.bundle import newest_bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.sandbox.process import SANDBOX
from cdt_runtime.serve.app import make_app
from cdt_runtime.serve.engine import Engine
from cdt_runtime.serve.guard import Limits
from cdt_runtime.serve.metrics import Metrics
from cdt_runtime.serve.scans import Scans

KEEP_ALIVE_S = 5
GRACE_S = 30
"""How long requests may go on after the service was told to end."""


@dataclass(frozen=True)
class Service:
    """What to serve, and how; `cdt-serve --help` says what each means."""

    bundle: str | None
    scans: Path | None
    token: str
    read_only: bool
    max_bytes: int
    seconds: float
    at_once: int
    audit: str | None
    trust: str | None
    backend: str
    precision: Precision


def listen(service: Service, door: socket.socket, ready: Callable[[Sequence[str]], None]) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        service: what to serve.
        door: socket that connections come to already.
        ready: is called once requests are answered, with what a user should know of the engine.

    Raises:
        CdtError: the bundle can't be used.
    """
    log = AuditLog(Path(service.audit)) if service.audit else None
    SANDBOX.start()
    classifier = FewShotClassifier.open(
        service.bundle or newest_bundle(Path("engines")),
        backend=service.backend,
        precision=service.precision,
        trust=Path(service.trust) if service.trust else None,
    )
    metrics = Metrics()
    engine = Engine(classifier, Scans(service.scans), metrics, log)
    limits = Limits(service.max_bytes, service.seconds, service.at_once)
    app = make_app(engine, metrics, service.token, limits, read_only=service.read_only)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    ready(classifier.notes)
    uvicorn.Server(config).run(sockets=[door])
