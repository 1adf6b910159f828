"""Nothing that was finished is lost, and nothing is half there, when a process is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kills(mode: str, folder: Path, rounds: int, *more: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, SCRIPT, mode, folder, str(rounds), *map(str, more)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "CDT_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rounds"), [("checkpoint", 200), ("export", 50)])
def test_a_kill_leaves_the_old_or_the_new(mode: str, rounds: int, tmp_path: Path) -> None:
    found = kills(mode, tmp_path, rounds)
    assert (found["kills"], found["bad"], found["left"]) == (rounds, [], [])
    assert found["saved"] > rounds  # it was not killed before it began


@pytest.mark.slow
def test_a_kill_while_enrolling_loses_no_version(
    bundle_dir: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    tile = phantom_dir / "new_patient" / "tumor_stroma_1.tif"
    found = kills("enroll", tmp_path, 50, bundle_dir, tile)
    assert (found["kills"], found["bad"]) == (50, [])
    assert found["saved"] > 50


@pytest.mark.slow
def test_training_killed_at_random_ends_with_the_same_bits(tmp_path: Path) -> None:
    found = kills("training", tmp_path, 20)
    assert found["kills"] >= 20
    assert found["bad"] == []
