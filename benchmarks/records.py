"""What a benchmark leaves behind: `results/NAME.json`, and the tables of the README."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cdt_runtime import doctor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PACKAGES = (
    *("torch", "numpy", "scikit-learn", "onnxruntime-gpu", "openvino", "tensorrt", "pycuda"),
)


def machine() -> dict[str, Any]:
    """The processor, and the versions that shape a figure."""
    text = Path("/proc/cpuinfo").read_text("utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": doctor.machine()["gpus"],
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_result(name: str, commands: Sequence[str], seconds: float, figures: Any) -> Path:
    """Write what a part found, with what it was found by."""
    path = RESULTS / f"{name}.json"
    record = {
        "part": name,
        "date": datetime.date.today().isoformat(),
        "commands": list(commands),
        "seconds": round(seconds),
        "machine": machine(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return path


def read_results() -> dict[str, dict[str, Any]]:
    """What each part that has been run found, by its name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_block(text: str, name: str, block: str) -> str:
    """Put a block of text between its marks `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: the text lacks the marks.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md lacks the marks {start.strip()} and {end}")
    return before + start + block + end + after
