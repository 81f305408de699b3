"""Small ONNX models to judge: built here, seeded, with known faults where a name says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from optimizers.samples import Samples

Array = NDArray[np.float32]
OPSET = 17


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    **weights: NDArray[Any],
) -> Path:
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "graph", list(inputs), list(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def mlp_weights(sizes: Sequence[int], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(pair) / pair[0] ** 0.5).astype(np.float32) for pair in itertools.pairwise(sizes)]


def mlp(
    path: Path,
    sizes: Sequence[int] = (16, 32, 5),
    *,
    seed: int = 0,
    weights: list[Array] | None = None,
    prefix: str = "",
    batch: int | str = "n",
) -> Path:
    """MatMul and Relu in turns from x[batch, sizes[0]] to y[batch, sizes[-1]]; `prefix` names what is inside."""
    weights = weights or mlp_weights(sizes, seed)
    nodes, last = [], "x"
    for i in range(len(weights)):
        out = "y" if i == len(weights) - 1 else f"{prefix}r{i}"
        nodes.append(helper.make_node("MatMul", [last, f"{prefix}w{i}"], [out if out == "y" else f"{prefix}m{i}"], name=f"{prefix}node{i}"))
        if out != "y":
            nodes.append(helper.make_node("Relu", [f"{prefix}m{i}"], [out]))
        last = out
    named = {f"{prefix}w{i}": w for i, w in enumerate(weights)}
    return save(path, nodes, [value("x", (batch, weights[0].shape[0]))], [value("y", (batch, weights[-1].shape[1]))], **named)


def deep(path: Path, layers: int, width: int = 128) -> Path:
    """`layers` products with the same small weight: arithmetic in proportion to depth, and a working set that stays in the cache."""
    nodes = []
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [f"t{i}" if i else "x", "w"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i + 1}" if i < layers - 1 else "y"]))
    return save(path, nodes, [value("x", ("n", width))], [value("y", ("n", width))], w=mlp_weights((width, width))[0])


def mlp_with(path: Path, extra: list[onnx.NodeProto], sizes: Sequence[int] = (16, 32, 5), **weights: NDArray[Any]) -> Path:
    """The same net, and `extra` nodes from its output `logits` to `y`."""
    first, second = mlp_weights(sizes)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m0"]),
        helper.make_node("Relu", ["m0"], ["r0"]),
        helper.make_node("MatMul", ["r0", "w1"], ["logits"]),
        *extra,
    ]
    return save(path, nodes, [value("x", ("n", sizes[0]))], [value("y", ("n", sizes[-1]))], w0=first, w1=second, **weights)


def noisy(weights: list[Array], share: float, seed: int = 1) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [(w + share * w.std() * rng.standard_normal(w.shape)).astype(np.float32) for w in weights]


def frozen_batch_inside(path: Path, sizes: Sequence[int] = (16, 32, 5)) -> Path:
    """Promises any batch, but a Reshape inside says one row: what an export from one example makes (case 41)."""
    nodes = [helper.make_node("Reshape", ["logits", "one"], ["y"])]
    return mlp_with(path, nodes, sizes, one=np.array([1, sizes[-1]], dtype=np.int64))


def scaled_by_company(path: Path, sizes: Sequence[int] = (16, 32, 5)) -> Path:
    """Rounds its answers to 1/127 of the largest in the batch, as dynamic quantization does with activations (case 31)."""
    nodes = [
        helper.make_node("Abs", ["logits"], ["size"]),
        helper.make_node("ReduceMax", ["size"], ["most"], keepdims=0),
        helper.make_node("Div", ["most", "steps"], ["step"]),
        helper.make_node("Div", ["logits", "step"], ["fine"]),
        helper.make_node("Round", ["fine"], ["whole"]),
        helper.make_node("Mul", ["whole", "step"], ["y"]),
    ]
    return mlp_with(path, nodes, sizes, steps=np.array(127, dtype=np.float32))


def nan_for_large(path: Path, sizes: Sequence[int] = (16, 32, 5), limit: float = 2.5) -> Path:
    """Log of a difference that is negative wherever a logit passes `limit` (case 13)."""
    nodes = [
        helper.make_node("Sub", ["limit", "logits"], ["room"]),
        helper.make_node("Log", ["room"], ["log"]),
        helper.make_node("Mul", ["log", "zero"], ["nothing"]),
        helper.make_node("Add", ["logits", "nothing"], ["y"]),
    ]
    return mlp_with(path, nodes, sizes, limit=np.array(limit, np.float32), zero=np.array(0, np.float32))


def wrong_for_class(path: Path, label: int, sizes: Sequence[int] = (16, 32, 5)) -> Path:
    """Right for every class but one, whose logit it lowers."""
    penalty = np.zeros(sizes[-1], np.float32)
    penalty[label] = -10
    return mlp_with(path, [helper.make_node("Add", ["logits", "penalty"], ["y"])], sizes, penalty=penalty)


def tokens_model(path: Path, *, length: int | str = "length", scale: float = 1.0) -> Path:
    """x[n, length, 8] to the mean over the length of x·w, [n, 4]; `length` frozen where it is a number."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("ReduceMean", ["m"], ["y"], axes=[1], keepdims=0),
    ]
    return save(path, nodes, [value("x", ("n", length, 8))], [value("y", ("n", 4))], w=scale * mlp_weights((8, 4))[0])


def frozen_length_inside(path: Path, length: int) -> Path:
    """Promises any length, but sums over exactly `length` places and divides by that."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("ReduceSum", ["m", "axis"], ["s"], keepdims=0),
        helper.make_node("Div", ["s", "length"], ["y"]),
    ]
    weights: dict[str, NDArray[Any]] = {"axis": np.array([1], np.int64), "length": np.array(length, np.float32)}
    return save(path, nodes, [value("x", ("n", "length", 8))], [value("y", ("n", 4))], w=mlp_weights((8, 4))[0], **weights)


def samples(
    path: Path, count: int = 400, width: int | Sequence[int] = 16, *, seed: int = 7, labels: NDArray[np.int64] | None = None
) -> str:
    shape = (width,) if isinstance(width, int) else tuple(width)
    inputs: dict[str, NDArray[np.generic]] = {"x": np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)}
    Samples(inputs, labels).save(path)
    return str(path)
