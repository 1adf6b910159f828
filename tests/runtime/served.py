"""A running `cdt-serve`, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOKEN = "a-token-for-tests-0123"


@dataclass(frozen=True)
class Served:
    """A service in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKEN}"}

    def resident_mib(self) -> float:
        """Memory of the process and of its children."""
        tree = [self.process.pid]
        for pid in tree:
            path = Path(f"/proc/{pid}/task/{pid}/children")
            tree += map(int, path.read_text().split())
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in tree]
        found = [re.search(r"VmRSS:\s+(\d+)", text) for text in texts]
        return sum(int(one[1]) for one in found if one) / 1024


@contextmanager
def serving(*words: object, cache: Path, token: str | None = TOKEN) -> Iterator[Served]:
    """Run `cdt-serve` on a free port until the block ends."""
    script = "from cdt_runtime.serve.cli import serve; serve()"
    environment = {**os.environ, "CDT_CACHE": str(cache)}
    environment.pop("CDT_SERVE_TOKEN", None)
    if token:
        environment["CDT_SERVE_TOKEN"] = token
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--port", "0", *map(str, words)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = ""
        while not line.startswith("listening on "):
            line = process.stderr.readline()
            assert line, f"cdt-serve ended with {process.wait()}"
        yield Served(line.split()[2], process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
