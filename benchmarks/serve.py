"""The service under load from a second process, against calls of the library.

    python benchmarks/serve.py [--bundle DIR] [--requests 2000]

Four ways over the same tiles, files to answers: the library, a tile a call; the library, batches;
the service with one client, and with eight. Then the service is left alone, and its memory after
the load is held against that before. Writes `benchmarks/results/serve.json`.
Needs `pip install 'cdt-edge[serve]' httpx`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import httpx
from records import ROOT, write_result
from timing import Times

from cdt_runtime import FewShotClassifier
from cdt_runtime.bundle import newest_bundle
from cdt_train.data.phantom import write_phantom

sys.path.append(str(ROOT / "tests" / "runtime"))
from served import Served, serving

CLIENTS = 8


def library(bundle: Path, backend: str, tiles: Sequence[Path], count: int) -> dict[str, Any]:
    """A tile a call, and then as many as the engine takes at once."""
    classifier = FewShotClassifier.open(bundle, backend=backend)
    context, times = classifier.context(None), Times()
    for tile in islice(cycle(tiles), 20):
        classifier.predict([tile], context)
    started = time.perf_counter()
    for tile in islice(cycle(tiles), count):
        times.add(lambda tile=tile: classifier.predict([tile], context))
    seconds = time.perf_counter() - started
    many = list(islice(cycle(tiles), count))
    started = time.perf_counter()
    classifier.predict(many, context)
    batched = time.perf_counter() - started
    return {**times.facts(), "per_second": count / seconds, "batched_per_second": count / batched}


def load(served: Served, uploads: Iterator[tuple[str, bytes]], clients: int) -> dict[str, Any]:
    """Ask from several clients at once until the uploads are used up."""
    times, errors, lock = Times(), [], threading.Lock()

    def ask() -> None:
        with httpx.Client(headers=served.headers, timeout=60) as client:
            while True:
                with lock:
                    upload = next(uploads, None)
                if upload is None:
                    return
                own = Times()
                answer = own.add(
                    lambda: client.post(f"{served.url}v1/classify", files={"tile": upload})  # noqa: B023
                )
                with lock:
                    times.wall += own.wall
                    errors.extend([] if answer.status_code == 200 else [answer.status_code])

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {**times.facts(), "per_second": len(times.wall) / seconds, "errors": len(errors)}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: newest in ./engines]")
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--requests", default=2000, show_default=True)
def main(bundle: Path | None, backend: str, requests: int) -> None:
    """Measure and report."""
    started = time.perf_counter()
    bundle = bundle or newest_bundle(Path("engines"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom(folder / "data", seed=11, n_patients=8, n_ct=3, regions_per_class=3)
        tiles = sorted((folder / "data" / "pathology_data").rglob("*.tif"))
        read = [(tile.name, tile.read_bytes()) for tile in tiles]

        def uploads(count: int) -> Iterator[tuple[str, bytes]]:
            return islice(cycle(read), count)

        found: dict[str, Any] = {"library": library(bundle, backend, tiles, requests)}
        words = ("--bundle", bundle, "--backend", backend)
        with serving(*words, cache=folder / "cache") as served:
            load(served, uploads(200), CLIENTS)
            before = served.resident_mib()
            found["one_client"] = load(served, uploads(requests), 1)
            found["clients"] = load(served, uploads(requests), CLIENTS)
            found["memory_mib"] = [before, served.resident_mib()]
            text = httpx.get(f"{served.url}metrics", headers=served.headers).text
            found["tiles_a_batch"] = _ratio(text)
    click.echo(json.dumps(found, indent=1))
    command = f"python benchmarks/serve.py --backend {backend} --requests {requests}"
    write_result("serve", [command], time.perf_counter() - started, found)


def _ratio(text: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    value: Callable[[str], float] = lambda name: float(lines[f"cdt_batch_tiles_{name}"])  # noqa: E731
    return round(value("sum") / value("count"), 2)


if __name__ == "__main__":
    main()
