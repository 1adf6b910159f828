"""`kill -9` at random moments, in a process that forks what is to be killed.

    python tests/kills.py checkpoint FOLDER 200
    python tests/kills.py export FOLDER 50
    python tests/kills.py enroll FOLDER 50 BUNDLE TILE
    python tests/kills.py training FOLDER 20

Each child goes on until it is killed and tells, over a pipe, what it has finished: that must never
be lost again. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Say = Callable[[int], None]
Work = Callable[[Say], None]


def killed(work: Work, rng: random.Random, longest: float) -> tuple[int | None, bool]:
    """Run something in a process of its own and kill it.

    Args:
        work: what it does; it calls `say` with the number of what is finished.
        rng: the moment, counted from the first `say`.
        longest: seconds.

    Returns:
        The last number that was said, and whether it ended by itself.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            work(lambda number: void(os.write(writer, number.to_bytes(8, "little"))))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    select.select([reader], [], [], 60)
    time.sleep(rng.uniform(0, longest))
    gone, status = os.waitpid(child, os.WNOHANG)
    if not gone:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    said = b""
    while part := os.read(reader, 1 << 16):
        said += part
    os.close(reader)
    whole = len(said) // 8 * 8
    last = int.from_bytes(said[whole - 8 : whole], "little") if whole else None
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a child ended by itself with {code}")
    return last, code == 0


def void(_: object) -> None:
    """Take a value and give none."""


def forever(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def checkpoint(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    import torch

    from cdt_train.checkpoint import load_checkpoint, save_checkpoint, sweep_partial

    torch.set_num_threads(1)
    path, bad, last = folder / "best.pt", [], 0

    def work(say: Say) -> None:
        for number in forever(last + 1):
            tensor = torch.full((100_000,), float(number))
            save_checkpoint(path, {"model_state_dict": {"w": tensor}, "number": number})
            say(number)

    for turn in range(rounds):
        finished, _ = killed(work, rng, 0.02)
        content = load_checkpoint(path, ("number",))
        found = int(content["number"])
        whole = bool((content["model_state_dict"]["w"] == found).all())
        if not whole or found < (finished or last):
            bad.append([turn, found, finished])
        last = found
        sweep_partial(folder)
    left = [entry.name for entry in folder.iterdir() if entry.name != path.name]
    return {"kills": rounds, "bad": bad, "left": left, "saved": last}


def export(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    from cdt_runtime.bundle import GRAPHS, Bundle, newest_bundle, write_bundle

    facts = {
        "precision": "fp32",
        "graphs": {name: {} for name in GRAPHS},
        "preprocess": {},
        "training": {"data": "none"},
    }
    path, bad, last = folder / "engines" / "small", [], 0

    def work(say: Say) -> None:
        for number in forever(last + 1):
            data = number.to_bytes(8, "little") * 20_000
            write_bundle(path, {f"{name}.onnx": data for name in GRAPHS}, facts)
            say(number)

    for turn in range(rounds):
        finished, _ = killed(work, rng, 0.04)
        bundle = Bundle.open(newest_bundle(path.parent))
        numbers = {int.from_bytes(bundle.read(f"{name}.onnx")[:8], "little") for name in GRAPHS}
        found = min(numbers)
        if len(numbers) > 1 or found < (finished or last):
            bad.append([turn, sorted(numbers), finished])
        last = found
    write_bundle(path, {f"{name}.onnx": b"" for name in GRAPHS}, facts)
    left = [entry.name for entry in path.parent.iterdir() if entry != path]
    return {"kills": rounds, "bad": bad, "left": left, "saved": last}


def enroll(folder: Path, rounds: int, rng: random.Random, bundle: str, tile: str) -> dict[str, Any]:
    """Versions only grow, and each is whole."""
    from cdt_runtime.bundle import Bundle
    from cdt_runtime.enroll import adding, versions, write_change
    from cdt_runtime.prototypes import FACTS, TENSORS, Prototypes

    path, bad = folder / "engines" / "one", []
    path.parent.mkdir()
    shutil.copytree(bundle, path)
    from cdt_runtime.classifier import FewShotClassifier

    classifier = FewShotClassifier.open(path, backend="onnxruntime")
    change = adding(classifier, [(tile, "a new class")])
    last = 1

    def work(say: Say) -> None:
        for _ in forever(0):
            opened = Bundle.open(path)
            write_change(opened, change)
            say(len(versions(Bundle.open(path))))

    for turn in range(rounds):
        finished, _ = killed(work, rng, 0.05)
        opened = Bundle.open(path)
        found = len(versions(opened))
        facts = opened.read(TENSORS), opened.read(FACTS)
        known = Prototypes.from_files(*facts, encoder_sha256=opened.encoder_sha256)
        if found < (finished or last) or "a new class" not in known.classes:
            bad.append([turn, found, finished])
        last = found
    return {"kills": rounds, "bad": bad, "left": [], "saved": last}


def training(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    """A run that is killed again and again ends with the weights of one that never was."""
    import torch
    from test_loop import FULL, Toy, run, same, scaled, weights

    from cdt_train.loop import train_phase

    torch.set_num_threads(1)
    schedule = FULL.__class__(**{**FULL.__dict__, "epochs": 60, "patience": None})

    def train(at: Path, say: Say) -> None:
        say(0)
        phase = Toy()
        train_phase(phase, schedule, run(at, resume=at.exists()), scaled())
        torch.save(weights(phase), at / "final.pt")

    train(folder / "whole", void)
    expected = torch.load(folder / "whole" / "final.pt", weights_only=True)
    kills, runs, bad = 0, 0, []
    while kills < rounds:
        at = folder / f"killed_{runs}"
        for turn in range(1000):  # noqa: B007
            _, ended = killed(lambda say, at=at: train(at, say), rng, 0.4)
            kills += not ended
            if ended:
                break
        runs += 1
        found = torch.load(at / "final.pt", weights_only=True)
        if not same(expected, found):
            bad.append([runs, turn])
    return {"kills": kills, "runs": runs, "bad": bad, "left": []}


MODES: dict[str, Callable[..., dict[str, Any]]] = {
    "checkpoint": checkpoint,
    "export": export,
    "enroll": enroll,
    "training": training,
}


def main() -> None:
    mode, folder, rounds, *more = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    found = MODES[mode](Path(folder), int(rounds), random.Random(3), *more)
    print(json.dumps(found, default=lambda value: np.asarray(value).tolist()))


if __name__ == "__main__":
    main()
