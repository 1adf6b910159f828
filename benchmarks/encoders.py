"""What foundation encoders of full size cost, without their weights.

    python benchmarks/encoders.py [--encoder KEY] [--quantize METHOD ...]

Counts weights and operations of every encoder whose library is here. Then builds one with random
weights, exports it and keeps its weights in fewer bits, each way in a process of its own: sizes,
cosine with PyTorch and peak memory. What weights say does not change what they
cost; accuracy needs the real ones. Writes `benchmarks/results/encoders.json` and the tables of the
README and of docs/encoders.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click
from records import README, ROOT, markdown, read_results, with_block, write_result

if TYPE_CHECKING:
    from cdt_train.encoders.entry import Entry

METHODS = ("none", "fp16", "int8", "int4")
DOCS = ROOT / "docs" / "encoders.md"
PEAK = """
import json, re, sys
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
"""
EXPORT = f"""{PEAK}
from cdt_export.foundation import export_encoder
from cdt_train.encoders.foundation import made_random
from cdt_train.encoders.registry import entry_of

exported = export_encoder(made_random(entry_of(sys.argv[1]), tiny=False, seed=0), sys.argv[2])
Path("encoder.onnx").write_bytes(exported.onnx)
print(json.dumps({{**exported.report, "peak_gib": peak()}}))
"""
RUN = f"""{PEAK}
import numpy as np
from cdt_runtime.backends import open_session
from cdt_train.encoders.registry import entry_of

spec = entry_of(sys.argv[1]).card.input
shape = (3, spec.size, spec.size) if spec.layout == "NCHW" else (spec.size, spec.size, 3)
session = open_session("onnxruntime", Path("encoder.onnx").read_bytes())
session.run({{"images": np.zeros((1, *shape), np.float32)}})
print(json.dumps(peak()))
"""
UNKNOWN = ("path-foundation",)
"""Of it only the number of weights is published."""


def measure(key: str, method: str, folder: str) -> dict[str, Any]:
    """Export one encoder one way, and run it alone."""
    started = time.monotonic()
    report = _in_process(folder, EXPORT, key, method)
    seconds = time.monotonic() - started
    return {**report, "seconds": seconds, "run_peak_gib": _in_process(folder, RUN, key)}


def _in_process(folder: str, code: str, *words: str) -> Any:
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cost(entry: Entry) -> dict[str, Any]:
    """Count the weights of an encoder and the operations of one image, slice or volume."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    spec = entry.card.input
    whole = spec.volume is not None and spec.volume.shape is not None
    shape = (3, spec.size, spec.size)
    if spec.volume is not None and spec.volume.shape is not None:
        shape = (len(spec.volume.windows), *spec.volume.shape)
    # Nets of slices and tiles are counted without memory; MONAI's can't be built so, and are small.
    with torch.device("cpu" if whole else "meta"), torch.no_grad():
        net = entry.random(entry.card).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros((1, *shape)))
    weights = sum(one.numel() for one in net.parameters())
    return {"weights": weights, "flop": counter.get_total_flops()}


def costs(known: dict[str, Any]) -> dict[str, Any]:
    """Count what can be counted here; keep what was counted elsewhere."""
    from cdt_train.encoders.registry import ENCODERS

    found = dict(known)
    for key, entry in ENCODERS.items():
        here = all(find_spec(name) for name in entry.card.packages)
        if here and key not in UNKNOWN:
            click.echo(f"{key} ...", err=True)
            found[key] = cost(entry)
    return {key: found[key] for key in ENCODERS if key in found}


def cost_table(found: dict[str, Any]) -> str:
    """A row an encoder."""
    from cdt_train.encoders.registry import ENCODERS

    head = ("key", "looks at", "width", "licence", "weights", "float32 / int8", "work")
    rows = []
    for key, entry in ENCODERS.items():
        card, one = entry.card, found.get(key)
        volume = card.input.volume
        looks = "tiles" if volume is None else "CT" if volume.shape else "slices of a CT"
        each = "tile" if volume is None else "volume" if volume.shape else "slice"
        terms = f"[{card.licence}]({card.licence_url})" + (", gated" if card.gated else "")
        weights = size = work = "–"
        if one:
            weights = f"{one['weights'] / 1e6:.0f} M"
            size = f"{one['weights'] * 4e-6:.0f} / {one['weights'] * 1.13e-6:.0f} MB"
            work = f"{one['flop'] / 1e9:.0f} GFLOP a {each}"
        rows.append((f"`{key}`", looks, f"{card.embedding_dim}", terms, weights, size, work))
    return markdown(head, rows)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row each export."""
    head = ("encoder", "weights kept as", "MB", "share of their bytes", "least cosine")
    head += ("memory to export, to run one image (GiB)",)
    rows = [
        (
            one["encoder"],
            {"none": "float32", "fp16": "float16"}.get(one["quantize"], one["quantize"]),
            f"{one['bytes'] / 1e6:.0f}",
            f"{one['bytes_covered']:.1%}" if one["bytes_covered"] else "–",
            f"{one['embedding']['min_cosine']:.5f}",
            f"{one['peak_gib']:.1f}, {one['run_peak_gib']:.1f}",
        )
        for one in found.values()
    ]
    return markdown(head, rows)


@click.command()
@click.option("--encoder", default="medsiglip", show_default=True)
@click.option("--quantize", multiple=True, default=METHODS, show_default=True)
@click.option("--costs", "only_costs", is_flag=True, help="Only count.")
@click.option("--table", "only_table", is_flag=True, help="Only renew the tables.")
def main(encoder: str, quantize: tuple[str, ...], only_costs: bool, only_table: bool) -> None:
    """Tell what encoders cost, and export one of full size in several ways."""
    import tempfile

    found = read_results().get("encoders", {}).get("figures", {"costs": {}, "exports": {}})
    if not only_table:
        started = time.monotonic()
        found["costs"] = costs(found["costs"])
        for method in () if only_costs else quantize:
            click.echo(f"{encoder} {method} ...", err=True)
            with tempfile.TemporaryDirectory() as folder:
                found["exports"][f"{encoder} {method}"] = measure(encoder, method, folder)
        command = f"python benchmarks/encoders.py --encoder {encoder}"
        click.echo(write_result("encoders", [command], time.monotonic() - started, found))
    for path, name, text in (
        (README, "encoders", table(found["exports"])),
        (DOCS, "costs", cost_table(found["costs"])),
    ):
        path.write_text(with_block(path.read_text("utf-8"), name, f"\n{text}\n"), "utf-8")


if __name__ == "__main__":
    main()
