"""The same graph with the same inputs in every engine that is here, checked before it is timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from cdt_export.graphs import Graph
from cdt_runtime.backends import BACKENDS, Precision, open_session
from cdt_runtime.errors import BackendError
from cdt_runtime.golden import HALF, relative_gap

Arrays = Mapping[str, NDArray[Any]]
REFERENCE = "PyTorch eager"


@dataclass
class Peer:
    """One engine with one graph.

    Attributes:
        run: named arrays in, named arrays out, on the host both times.
        opened_ms: to load the graph.
        gap: largest difference from PyTorch, as a share of an output's range.
    """

    run: Callable[[Arrays], Mapping[str, NDArray[Any]]]
    opened_ms: float
    gap: float = 0.0


def peers_of(graph: Graph, onnx: bytes, inputs: Arrays, *, full: bool) -> dict[str, Peer | str]:
    """Open a graph in each engine and compare the answers.

    Args:
        graph: the PyTorch module and the names of its outputs.
        onnx: the exported graph.
        inputs: of one call.
        full: also compile with torch.

    Returns:
        By name a peer, or why there is none.
    """
    openers: dict[str, Callable[[], Callable[[Arrays], Any]]] = {
        REFERENCE: lambda: _torch(graph, graph.module, "cpu")
    }
    if full:
        openers["torch.compile"] = lambda: _torch(graph, torch.compile(graph.module), "cpu")
    openers["ONNX Runtime, defaults"] = lambda: _defaults(onnx, "CPUExecutionProvider")
    if BACKENDS["cuda"].present():
        openers["PyTorch eager, GPU"] = lambda: _torch(graph, graph.module, "cuda")
        openers["ONNX Runtime, CUDA defaults"] = lambda: _defaults(onnx, "CUDAExecutionProvider")
        openers["ONNX Runtime, TensorRT"] = lambda: _defaults(onnx, "TensorrtExecutionProvider")
    for name, backend in BACKENDS.items():
        if backend.present():
            openers[f"{name} auto"] = lambda name=name: _ours(name, onnx, "auto")
            openers[f"{name} fp32"] = lambda name=name: _ours(name, onnx, "fp32")
    for name in ("onnxruntime", "tensorrt"):  # always in the graph's own precision
        openers.pop(f"{name} fp32", None)
    found: dict[str, Peer | str] = {}
    for name, opener in openers.items():
        found[name] = _opened(opener, inputs)
    reference = found[REFERENCE]
    if isinstance(reference, str):
        raise RuntimeError(reference)
    expected = reference.run(inputs)
    for name, peer in found.items():
        if isinstance(peer, Peer):
            answers = peer.run(inputs)
            peer.gap = max(relative_gap(n, answers[n], expected[n]) for n in expected)
            if not peer.gap <= HALF:
                found[name] = f"another answer: off by {peer.gap:.2g} of its range"
    return found


def _opened(opener: Callable[[], Any], inputs: Arrays) -> Peer | str:
    started = time.perf_counter()
    try:
        run = opener()
        run(inputs)
    except (BackendError, RuntimeError, ValueError, OSError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return Peer(run, (time.perf_counter() - started) * 1e3)


def _torch(graph: Graph, module: nn.Module, device: str) -> Callable[[Arrays], Any]:
    module = copy.deepcopy(module).to(device) if device != "cpu" else module
    names = [*graph.inputs]

    @torch.inference_mode()
    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        found = module(*(torch.from_numpy(arrays[name]).to(device) for name in names))
        outputs = found if isinstance(found, tuple) else (found,)
        return {n: one.cpu().numpy() for n, one in zip(graph.outputs, outputs, strict=True)}

    return run


def _defaults(onnx: bytes, provider: str) -> Callable[[Arrays], Any]:
    import onnxruntime as ort

    session = ort.InferenceSession(onnx, providers=[provider])
    if session.get_providers()[0] != provider:
        raise BackendError(f"ONNX Runtime gives {session.get_providers()[0]}")
    names = [one.name for one in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, dict(arrays)), strict=True))


def _ours(backend: str, onnx: bytes, precision: Precision) -> Callable[[Arrays], Any]:
    return open_session(backend, onnx, precision).run


def flops(graph: Graph, inputs: Arrays) -> int:
    """Floating-point operations of one call, counted by PyTorch; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        graph.module(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
    return int(counter.get_total_flops())


def peak_flops(device: str) -> dict[str, float]:
    """Floating-point operations a second of a large product, the best of ten, by type."""
    found, side = {}, 8192 if device == "cuda" else 1024
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, dtype=kind, device=device)
        best = float("inf")
        for _ in range(10):
            started = time.perf_counter()
            torch.mm(a, a).sum().item()  # a number on the host: the work is done
            best = min(best, time.perf_counter() - started)
        found[name] = 2 * side**3 / best
    return found


def graphs_of(checkpoint: Path) -> dict[str, Graph]:
    """The modules of a checkpoint as they are exported, by name."""
    from cdt_export.graphs import build_graphs
    from cdt_train.trained import load_trained

    trained = load_trained(checkpoint)
    classes = len(trained.info["classes"])
    graphs = build_graphs(trained.model, trained.preprocess, n_classes=classes)
    return {graph.name: graph for graph in graphs}
