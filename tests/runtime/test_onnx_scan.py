"""A graph that names another file never reaches an engine."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cdt_runtime.backends import open_session
from cdt_runtime.errors import BackendError, BundleError
from cdt_runtime.onnx_scan import require_whole


def tensor(outside: bool) -> TensorProto:
    made = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    if outside:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="location", value="../../etc/passwd")
    return made


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2])


def as_initializer(outside: bool) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [value("x")], [value("y")], [tensor(outside)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def as_constant(outside: bool) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=tensor(outside))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([constant, node], "g", [value("x")], [value("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def in_a_branch(outside: bool) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=tensor(outside))
    branch = helper.make_graph([constant], "b", [], [value("w")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [value("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def in_a_function(outside: bool) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=tensor(outside))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "f", ["x"], ["y"], [constant, node], opset)
    call = helper.make_node("f", ["x"], ["y"], domain="own")
    graph = helper.make_graph([call], "g", [value("x")], [value("y")])
    imports = [*opset, helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=8)


@pytest.mark.parametrize("make", [as_initializer, as_constant, in_a_branch, in_a_function])
def test_a_tensor_elsewhere_is_refused(make: Callable[[bool], onnx.ModelProto]) -> None:
    require_whole(make(False).SerializeToString(), "a.onnx")
    with pytest.raises(BundleError, match=r"^a\.onnx: keeps tensors in another file: expected a"):
        require_whole(make(True).SerializeToString(), "a.onnx")
    with pytest.raises(BundleError, match="keeps tensors in another file"):
        open_session("onnxruntime", make(True).SerializeToString())


def test_a_sound_graph_still_runs() -> None:
    session = open_session("onnxruntime", as_initializer(False).SerializeToString())
    found = session.run({"x": np.eye(2, dtype=np.float32)})["y"]
    assert np.array_equal(found, np.ones((2, 2)))


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"\x3a\xff", b"\x3a\x02\x2a", b"\xff" * 20, b"\x3b"]
)
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises((BundleError, BackendError)):
        open_session("onnxruntime", data)


def test_graphs_without_end_are_refused() -> None:
    data = b"\x12\x08location"  # the innermost graph's name
    for _ in range(200):  # a node with an attribute with a graph with a node ...
        for key in (b"\x32", b"\x2a", b"\x0a"):
            data = key + _length(len(data)) + data
    with pytest.raises(BundleError, match="is no ONNX graph"):
        require_whole(b"\x3a" + _length(len(data)) + data, "a.onnx")


def _length(size: int) -> bytes:
    out = b""
    while size > 127:
        out += bytes([size & 127 | 128])
        size >>= 7
    return out + bytes([size])


def test_it_agrees_with_the_library_on_damaged_graphs() -> None:
    """Whatever the library reads and finds to point outside is refused."""
    rng = random.Random(7)
    whole = as_constant(True).SerializeToString()
    seen = 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            model = onnx.ModelProto.FromString(bytes(data))
        except Exception:  # the library's own class for what it can't read
            continue
        tensors = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
        outside = [
            one
            for one in [*tensors, *model.graph.initializer]
            if any(entry.key == "location" for entry in one.external_data)
        ]
        if outside:
            seen += 1
            with pytest.raises(BundleError):
                require_whole(bytes(data), "a.onnx")
    assert seen > 500
