"""Damaged files by the thousand, each from its number alone: what any of them may come to.

    python tests/runtime/fuzzing.py tiff --count 1000000 --first 10000

runs longer than CI does. A mutant that comes to anything but a sound result or one input error is
printed with its number: mend what it found, and keep it as a test of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

sys.path.insert(0, str(Path(__file__).parent))
import dicom_maker
import tile_cases

from cdt_runtime.bundle import GRAPHS, MANIFEST, Bundle, sha256, write_bundle
from cdt_runtime.errors import CdtError
from cdt_runtime.reading import SANDBOX, read_series, read_tile

SLOW_S = 10.0
MEMORY = 2 << 30
ODD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutant(seeds: list[bytes], number: int) -> bytes:
    """Damage one of some files; the same number gives the same bytes."""
    rng = random.Random(number)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data)) if data else 0
        # Headers decide the most: half the damage is done there.
        at = min(at, rng.randrange(512)) if rng.random() < 0.5 else at
        match rng.randrange(9):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.randrange(256)
            case 2:
                data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(ODD) & 0xFFFF)
            case 3:
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(ODD))
            case 4:
                del data[at : at + rng.randrange(1, 64)]
            case 5:
                part = data[at : at + rng.randrange(1, 64)]
                data[at:at] = part
            case 6:
                data[at : at + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
            case 7:
                other = rng.choice(seeds)
                start = rng.randrange(len(other))
                data[at : at + 32] = other[start : start + 32]
            case 8 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


@cache
def tiff_seeds() -> list[bytes]:
    return [case[1] for case in tile_cases.READ]


@cache
def dicom_seeds() -> list[bytes]:
    folder = Path(tempfile.mkdtemp(prefix="cdt-seeds-"))
    try:
        made = [dicom_maker.data_set(0), dicom_maker.enhanced(4)]
        made += [
            dicom_maker.data_set(0, syntax)
            for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian)
        ]
        deflated = dicom_maker.data_set(0)
        deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        made.append(deflated)
        cells = dicom_maker.values(0)
        import imagecodecs

        for syntax, stream in (
            (RLELossless, dicom_maker.rle(cells)),
            (JPEG2000Lossless, imagecodecs.jpeg2k_encode(cells, reversible=True, level=0)),
            (dicom_maker.JPEGLSLossless, imagecodecs.jpegls_encode(cells.view(np.uint16))),
        ):
            ds = dicom_maker.data_set(0)
            dicom_maker.set_compressed(ds, syntax, stream)
            made.append(ds)
        paths = [dicom_maker.save(ds, folder / f"{at}.dcm") for at, ds in enumerate(made)]
        return [path.read_bytes() for path in paths]
    finally:
        shutil.rmtree(folder)


@cache
def onnx_seeds() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    made = []
    kernel = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weights = {"k": kernel, "w": rng.standard_normal((4, 2)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    made.append(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    return made


@dataclass
class Found:
    """What mutants came to.

    Attributes:
        kinds: how many came to what.
        bad: number and what is wrong, of those that must not be.
        slowest: seconds of the slowest.
        memory: bytes that the decoding process had at most.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0


def as_tile(data: bytes, place: Path) -> None:
    path = place.with_suffix(".tif")
    path.write_bytes(data)
    tile = read_tile(path, mpp=0.5)
    assert tile.pixels.size, "an empty result"
    assert tile.pixels.shape[2] == len(tile.channels), "channels without names"
    assert np.isfinite(tile.pixels).all(), "values that are not finite"


def as_series(data: bytes, place: Path) -> None:
    place.mkdir(exist_ok=True)
    (place / "a.dcm").write_bytes(data)
    volume = read_series(place, min_slices=1)
    assert volume.hu.size, "an empty result"
    assert np.isfinite(volume.hu).all(), "values that are not finite"
    assert all(0 < one < 100 for one in volume.spacing_mm), "a spacing that none has"


FACTS: dict[str, Any] = {
    "precision": "fp32",
    "graphs": {
        name: {"inputs": {}, "outputs": {"ct_tokens": {"shape": [1, 4, 8]}}} for name in GRAPHS
    },
    "training": {"data": "none", "classes": ["a", "b"], "k_shot": 5},
    "parity": {},
    "encoders": [],
}
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, 2**63, "", "x" * 5000, "../../x", "a\0b", "\ud800", [], {}, [[]]),
    *({"a": None}, [1, "a"], "NaN", ["R", "R", "R"], -0.0, {"../x": {"bytes": 1, "sha256": "0"}}),
)


def nodes_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a tree of JSON: the container and the key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from nodes_of(inner)


def as_manifest(number: int, place: Path) -> None:
    """Damage a manifest: half the time its bytes, else what it says, with all hashes right."""
    from cdt_runtime.preprocess import Preprocess

    if not (place / MANIFEST).exists():
        preprocess = Preprocess(("R", "G", "B"), image_size=64, tile_mpp=0.5).to_dict()
        files = {f"{name}.onnx": name.encode() for name in GRAPHS}
        write_bundle(place, files, {**FACTS, "preprocess": preprocess})
        (place.parent / "whole.json").write_bytes((place / MANIFEST).read_bytes())
    whole = (place.parent / "whole.json").read_bytes()
    if number % 2:
        (place / MANIFEST).write_bytes(mutant([whole], number))
    else:
        rng = random.Random(number)
        manifest = copy.deepcopy(json.loads(whole))
        for _ in range(rng.choice((1, 1, 2))):
            container, key = rng.choice(list(nodes_of(manifest)))
            if isinstance(container, dict) and rng.random() < 0.2:
                container.pop(key, None)
            elif key in container if isinstance(container, dict) else key < len(container):
                container[key] = copy.deepcopy(rng.choice(NASTY))
        (place / MANIFEST).write_bytes(rehashed(manifest))
    bundle = Bundle.open(place)
    assert bundle.identity
    assert bundle.encoder_sha256
    assert bundle.ct_encoder_sha256
    assert bundle.preprocess.ct_shape
    for name in GRAPHS:
        bundle.read(f"{name}.onnx")


def rehashed(manifest: Any) -> bytes:
    """A manifest as one who is no friend would write it: whole, by its hash."""

    def dump(what: Any) -> bytes:
        text = json.dumps(what, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "surrogatepass")

    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return dump({**rest, "manifest_sha256": sha256(dump(rest))})


def as_graph(data: bytes, place: Path) -> None:
    from cdt_runtime.backends import open_session

    session = open_session("onnxruntime", data)
    session.run({"x": np.ones((1, 3, 8, 8), np.float32)})


RUNS: dict[str, Callable[[int, Path], None]] = {
    "tiff": lambda number, place: as_tile(mutant(tiff_seeds(), number), place),
    "dicom": lambda number, place: as_series(mutant(dicom_seeds(), number), place),
    "manifest": as_manifest,
    "onnx": lambda number, place: as_graph(mutant(onnx_seeds(), number), place),
}


def run(kind: str, numbers: range, threads: int = 2) -> Found:
    """Run mutants of a format, and tell what they came to."""
    found = Found()
    root = Path(tempfile.mkdtemp(prefix="cdt-fuzz-", dir=fast_folder()))
    act = RUNS[kind]
    threads = threads if kind in ("tiff", "dicom") else 1

    def one(number: int) -> None:
        started = time.monotonic()
        try:
            act(number, root / f"m{number % threads}" if kind == "manifest" else root / f"{number}")
        except CdtError as error:
            text = str(error)
            found.kinds["refused"] += 1
            if "\n" in text or not text.strip():
                found.bad.append((number, f"not one line: {text[:200]!r}"))
            if "its decoder" in text or "decoding process ended" in text:
                found.bad.append((number, text))
        except AssertionError as error:
            found.bad.append((number, str(error)))
        except BaseException as error:
            found.bad.append((number, f"{type(error).__name__}: {error}"))
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            found.kinds["read"] += 1
        took = time.monotonic() - started
        found.slowest = max(found.slowest, took)
        if took > SLOW_S:
            found.bad.append((number, f"took {took:.1f} s"))
        for left in (root / f"{number}.tif", root / f"{number}"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(True)

    try:
        with ThreadPoolExecutor(threads) as pool, watched(found):
            for _ in pool.map(one, numbers):
                pass
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if found.memory > MEMORY:
        found.bad.append((-1, f"{found.memory >> 20} MiB of memory"))
    return found


def fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def watched(found: Found) -> Iterator[None]:
    """Note the most memory that the decoding process had."""
    SANDBOX.close()
    try:
        yield
    finally:
        worker = SANDBOX._worker
        if worker is not None and not worker.ended:
            status = Path(f"/proc/{worker._process.pid}/status").read_text("utf-8")
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            found.memory = int(peak.split()[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged files by the thousand.")
    parser.add_argument("kind", choices=RUNS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    started = time.monotonic()
    found = run(asked.kind, range(asked.first, asked.first + asked.count))
    for number, why in found.bad:
        print(f"{asked.kind} {number}: {why}")
    print(
        f"{asked.count} mutants, {dict(found.kinds)}, {len(found.bad)} bad, "
        f"slowest {found.slowest:.2f} s, {found.memory >> 20} MiB, "
        f"{time.monotonic() - started:.0f} s"
    )
    sys.exit(bool(found.bad))


if __name__ == "__main__":
    main()
