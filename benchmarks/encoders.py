"""What a foundation encoder of full size takes to export, without its weights.

    python benchmarks/encoders.py [--encoder KEY] [--quantize METHOD ...]

Builds the encoder with random weights, exports it and keeps its weights in fewer bits, each in a
process of its own: sizes, cosine with PyTorch, seconds and peak memory. What weights say does not
change what they cost; accuracy needs the real ones. Writes `benchmarks/results/encoders.json` and
the table of the README.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import click
from records import README, markdown, read_results, with_block, write_result

METHODS = ("none", "fp16", "int8", "int4")
CODE = """
import json, sys
from cdt_export.foundation import export_encoder
from cdt_train.encoders.foundation import made_random
from cdt_train.encoders.registry import entry_of
encoder = made_random(entry_of(sys.argv[1]), tiny=False, seed=0)
print(json.dumps(export_encoder(encoder, sys.argv[2]).report))
sys.stderr.write(open("/proc/self/status").read())
"""


def measure(key: str, method: str) -> dict[str, Any]:
    """Export one encoder one way, in a process of its own."""
    started = time.monotonic()
    line = [sys.executable, "-c", CODE, key, method]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{key} {method}: {done.stderr.strip().splitlines()[-1]}")
    peak = re.search(r"VmHWM:\s*(\d+) kB", done.stderr)
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = time.monotonic() - started
    return {**report, "seconds": seconds, "peak_gib": int(peak[1]) / 2**20 if peak else None}


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row each export."""
    head = ("encoder", "kept as", "MB", "of its bytes", "min cosine", "peak memory, GiB")
    rows = [
        (
            one["encoder"],
            one["quantize"],
            f"{one['bytes'] / 1e6:.0f}",
            f"{one['bytes_covered']:.1%} covered",
            f"{one['embedding']['min_cosine']:.6f}",
            f"{one['peak_gib']:.1f}",
        )
        for one in found.values()
    ]
    return markdown(head, rows)


@click.command()
@click.option("--encoder", default="medsiglip", show_default=True)
@click.option("--quantize", multiple=True, default=METHODS, show_default=True)
@click.option("--table", "only_table", is_flag=True, help="Only renew the README.")
def main(encoder: str, quantize: tuple[str, ...], only_table: bool) -> None:
    """Export an encoder of full size with random weights, in several ways."""
    if not only_table:
        started, found = time.monotonic(), {}
        for method in quantize:
            click.echo(f"{encoder} {method} ...", err=True)
            found[f"{encoder} {method}"] = measure(encoder, method)
        command = f"python benchmarks/encoders.py --encoder {encoder}"
        click.echo(write_result("encoders", [command], time.monotonic() - started, found))
    block = "\n" + table(read_results()["encoders"]["figures"]) + "\n"
    README.write_text(with_block(README.read_text("utf-8"), "encoders", block), "utf-8")


if __name__ == "__main__":
    main()
