"""One layer of an ONNX graph as a matrix, its truncated SVD, and the two layers that take its place. MatMul, Gemm and convolutions.

A k×k convolution with i inputs and o outputs is the matrix [i·k², o]: at rank r it becomes a k×k convolution to r channels and a 1×1 one to o
(Zhang et al. 2016, arXiv:1505.06798, without the nonlinearity). Strides, padding and dilation stay with the first, the bias with the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from optimizers.census import infer_shapes
from optimizers.onnx_graph import attributes, constants, initializers, set_constant

Matrix = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A layer whose constant weight is the matrix [k, n]. `places`: how often a row of inputs meets it (positions of a map, steps of a sequence)."""

    name: str
    weight: Matrix
    places: int = 1
    kernel: tuple[int, ...] = ()
    """[o, i, kh, kw] of a convolution."""
    image: tuple[int, ...] = ()
    """[1, i, h, w] that a convolution takes of one row; () where it is not known."""
    how: tuple[tuple[str, Any], ...] = ()
    """A convolution's attributes."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def operations(self) -> int:
        """Multiply-adds of one row."""
        return math.prod(self.shape) * self.places

    def operations_at(self, rank: int) -> int:
        return rank * sum(self.shape) * self.places

    @property
    def break_even(self) -> int:
        """The largest rank at which two thin layers multiply less than the one."""
        k, n = self.shape
        return min(k, n, (k * n - 1) // (k + n))

    @cached_property
    def _svd(self) -> tuple[Matrix, Matrix, Matrix]:
        u, s, v = np.linalg.svd(self.weight.astype(np.float64), full_matrices=False)
        return u, s, v

    @cached_property
    def kept(self) -> Matrix:
        """Share of the energy Σ σ² that the first 1, 2, … singular values hold."""
        s = self._svd[1]
        return np.cumsum(s**2) / max(float((s**2).sum()), 1e-300)

    def rank_of(self, energy: float) -> int:
        """The least rank that keeps `energy`."""
        return min(int(np.searchsorted(self.kept, energy)) + 1, len(self.kept))

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """[k, r] and [r, n], the best of that rank (Eckart and Young 1936), the singular values shared by their roots."""
        u, s, v = self._svd
        root = np.sqrt(s[:rank])
        return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)

    def weights(self, rank: int) -> tuple[Matrix, Matrix]:
        """The factors as the two layers hold them."""
        first, second = self.factors(rank)
        if not self.kernel:
            return first, second
        o, *inner = self.kernel
        return first.T.reshape(rank, *inner), second.T.reshape(o, rank, *(1 for _ in inner[1:]))


def layers_of(model: ModelProto, row: Shapes | None, excluded: frozenset[str]) -> list[Layer]:
    """Products with a constant matrix [k, n] of floats on their right, and ungrouped convolutions with a constant kernel."""
    floats = {name for name, tensor in initializers(model.graph).items() if tensor.data_type == TensorProto.FLOAT}
    values, shapes = constants(model.graph), infer_shapes(model, dict(row) if row else None)
    found = []
    for node in model.graph.node:
        if node.op_type not in {"MatMul", "Gemm", "Conv"} or node.input[1] not in floats or node.name in excluded:
            continue
        weight, how, out = values[node.input[1]], attributes(node), shapes.get(node.output[0], ())
        if node.op_type == "Conv":
            if how.get("group", 1) == 1 and weight.ndim > 2:
                matrix, places = weight.reshape(len(weight), -1).T, max(1, math.prod(out[2:]))
                found.append(Layer(node.name, matrix, places, weight.shape, shapes.get(node.input[0], ()), tuple(how.items())))
        elif weight.ndim == 2 and not how.get("transA", 0) and how.get("alpha", 1.0) == 1.0:
            found.append(Layer(node.name, weight.T if how.get("transB", 0) else weight, max(1, math.prod(out[:-1]))))
    return found


def split(model: ModelProto, layer: Layer, rank: int) -> None:
    """Two layers of that rank in the place of the one, in the graph itself."""
    graph = model.graph
    at, node = next((i, n) for i, n in enumerate(graph.node) if n.name == layer.name)
    names = f"{node.output[0]}.low_rank_a", f"{node.output[0]}.low_rank_b"
    for name, value in zip(names, layer.weights(rank), strict=True):
        set_constant(graph, name, value)
    between = f"{node.output[0]}.low_rank"
    thin = _first(layer, [node.input[0], names[0]], between)
    node.input[0], node.input[1] = between, names[1]
    kept = [a for a in node.attribute if a.name != "transB"] if not layer.kernel else []
    del node.attribute[:]
    node.attribute.extend(kept)
    graph.node.insert(at, thin)


def whole(layer: Layer, rows: int) -> ModelProto:
    """A model of that layer alone, without its bias."""
    weight = layer.weight.T.reshape(layer.kernel) if layer.kernel else layer.weight
    return _alone(layer, [_first(layer, ["x", "w0"], "y")], {"w0": weight}, rows)


def halves(layer: Layer, rank: int, rows: int) -> ModelProto:
    """The same as two layers of that rank."""
    first, second = layer.weights(rank)
    kind = "Conv" if layer.kernel else "MatMul"
    return _alone(layer, [_first(layer, ["x", "w0"], "h"), helper.make_node(kind, ["h", "w1"], ["y"])], {"w0": first, "w1": second}, rows)


def input_of(layer: Layer, rows: int) -> Matrix:
    """Random inputs of so many rows."""
    shape = (rows, *layer.image[1:]) if layer.kernel else (rows * layer.places, layer.shape[0])
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _first(layer: Layer, inputs: list[str], output: str) -> NodeProto:
    if not layer.kernel:
        return helper.make_node("MatMul", inputs, [output], name=f"{layer.name}.thin")
    return helper.make_node("Conv", inputs, [output], name=f"{layer.name}.thin", **dict(layer.how))


def _alone(layer: Layer, nodes: list[NodeProto], weights: Mapping[str, Matrix], rows: int) -> ModelProto:
    value, x = helper.make_tensor_value_info, input_of(layer, rows).shape
    graph = helper.make_graph(nodes, "layer", [value("x", TensorProto.FLOAT, x)], [value("y", TensorProto.FLOAT, None)])
    for name, weight in weights.items():
        set_constant(graph, name, np.ascontiguousarray(weight, dtype=np.float32))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
