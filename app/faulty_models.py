"""ONNX files made of another one, for `hone demo --break`: slower, answering NaN, or for images of any size. Knows no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def slower_twin(source: Path, target: Path, times: int) -> None:
    """The same network computed `times` over side by side, its outputs averaged: right, and as much slower. Real arithmetic, nothing folds away."""
    import onnx
    from onnx import helper

    model = onnx.load(str(source))
    graph = model.graph
    output = graph.output[0].name
    shared = {one.name for one in graph.initializer} | {one.name for one in graph.input}
    original = list(graph.node)
    del graph.node[:]
    for copy in range(times):
        scaled = f"twin{copy}_in"
        factor = onnx.numpy_helper.from_array(_scalar(1.0 + copy * 1e-6), f"twin{copy}_factor")
        graph.initializer.append(factor)
        graph.node.append(helper.make_node("Mul", [graph.input[0].name, factor.name], [scaled], name=f"twin{copy}_mul"))
        for node in original:
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = f"twin{copy}_{node.name}"
            twin.input[:] = [_named(name, copy, shared, graph.input[0].name, scaled) for name in node.input]
            twin.output[:] = [f"twin{copy}_{name}" for name in node.output]
            graph.node.append(twin)
    graph.node.append(helper.make_node("Mean", [f"twin{copy}_{output}" for copy in range(times)], [output], name="twins_mean"))
    del graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def free_size(source: Path, target: Path) -> None:
    """The same network with free height and width: its convolutions and its mean over places take any."""
    import onnx

    model = onnx.load(str(source))
    for name, dim in zip(("height", "width"), model.graph.input[0].type.tensor_type.shape.dim[2:], strict=True):
        dim.dim_param = name
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def not_a_number(source: Path, target: Path) -> None:
    """The same network, whose outputs go through a logarithm of something that is below zero for bright images only."""
    import onnx
    from onnx import helper

    model = onnx.load(str(source))
    graph = model.graph
    output, image = graph.output[0].name, graph.input[0].name
    for node in graph.node:
        node.output[:] = [f"{name}_before" if name == output else name for name in node.output]
        node.input[:] = [f"{name}_before" if name == output else name for name in node.input]
    limit = onnx.numpy_helper.from_array(_scalar(0.3), "nan_limit")
    axes = onnx.numpy_helper.from_array(_axes(), "nan_axes")
    graph.initializer.extend([limit, axes])
    graph.node.extend([
        helper.make_node("ReduceMean", [image, "nan_axes"], ["nan_mean"], keepdims=0, name="nan_reduce")
        if _opset(model) >= 18
        else helper.make_node("ReduceMean", [image], ["nan_mean"], axes=[1, 2, 3], keepdims=0, name="nan_reduce"),
        helper.make_node("Sub", ["nan_limit", "nan_mean"], ["nan_left"], name="nan_sub"),
        helper.make_node("Unsqueeze", ["nan_left", "nan_column"], ["nan_left2"], name="nan_unsqueeze"),
        helper.make_node("Log", ["nan_left2"], ["nan_log"], name="nan_log_node"),
        helper.make_node("Mul", ["nan_log", "nan_zero"], ["nan_gone"], name="nan_mul"),
        helper.make_node("Add", [f"{output}_before", "nan_gone"], [output], name="nan_add"),
    ])  # fmt: skip
    import numpy as np

    graph.initializer.extend([
        onnx.numpy_helper.from_array(np.array([1], np.int64), "nan_column"), onnx.numpy_helper.from_array(_scalar(0.0), "nan_zero"),
    ])  # fmt: skip
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def _named(name: str, copy: int, shared: set[str], image: str, scaled: str) -> str:
    if name == image:
        return scaled
    return name if not name or name in shared else f"twin{copy}_{name}"


def _opset(model: Any) -> int:
    return max(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))


def _scalar(value: float) -> Any:
    import numpy as np

    return np.array(value, np.float32)


def _axes() -> Any:
    import numpy as np

    return np.array([1, 2, 3], np.int64)
