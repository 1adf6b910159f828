"""10,000 damaged files of each format: a sound result or one input error, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

COUNT = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiff", "dicom", "manifest"])
def test_mutants(kind: str) -> None:
    found = fuzzing.run(kind, range(COUNT))
    assert found.bad == []
    assert sum(found.kinds.values()) == COUNT
    assert min(found.kinds["read"], found.kinds["refused"]) > COUNT // 20  # it reached both ends


@pytest.mark.slow
def test_mutants_of_graphs() -> None:
    """In a process of its own: the engine reads them in the one that asks."""
    script = Path(fuzzing.__file__)
    done = subprocess.run(
        [sys.executable, script, "onnx", "--count", str(COUNT)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{COUNT} mutants" in done.stdout
    assert " 0 bad" in done.stdout


def test_a_mutant_is_known_by_its_number() -> None:
    seeds = fuzzing.tiff_seeds()
    assert [fuzzing.mutant(seeds, n) for n in range(50)] == [
        fuzzing.mutant(seeds, n) for n in range(50)
    ]
    assert len({fuzzing.mutant(seeds, n) for n in range(1000)}) > 950
