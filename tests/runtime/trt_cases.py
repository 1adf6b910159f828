"""Small graphs to build TensorRT's plans of, and what stands for a bundle of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdt_runtime.backends.trt_build import build_plans


def small_graph(constant: float = 2.0, tile: str = "batch") -> bytes:
    """Scores of uint8 tiles `(B, 3, 4, 4)` against prototypes `(K, 3)`."""
    from onnx import TensorProto, helper

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [
        helper.make_node("Cast", ["tile"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0),
        helper.make_node("Transpose", ["prototypes"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["embedding", "columns"], ["products"]),
        helper.make_node("Mul", ["products", "constant"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            value("tile", TensorProto.UINT8, tile, 3, 4, 4),
            value("prototypes", TensorProto.FLOAT, "classes", 3),
        ],
        [
            value("embedding", TensorProto.FLOAT, tile, 3),
            value("logits", TensorProto.FLOAT, tile, "classes"),
        ],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("constant", TensorProto.FLOAT, [1], [constant]),
        ],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


def fixed_graph() -> bytes:
    """One without a free dimension, as the CT encoder is."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["ct"], ["ct_tokens"])],
        "fixed",
        [info("ct", TensorProto.FLOAT, [1, 4])],
        [info("ct_tokens", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


class FewGraphs:
    """Stands for a bundle: graphs by name."""

    def __init__(self, graphs: dict[str, bytes], precision: str = "fp16") -> None:
        self.path, self._graphs = Path("engines/some"), graphs
        self.manifest = {"graphs": {name: {} for name in graphs}, "precision": precision}

    def read(self, name: str) -> bytes:
        return self._graphs[name.removesuffix(".onnx")]


def build(*graphs: bytes, precision: str = "fp16") -> list[Path]:
    bundle: Any = FewGraphs({f"graph{n}": graph for n, graph in enumerate(graphs)}, precision)
    return [path for _, path in build_plans(bundle)]
