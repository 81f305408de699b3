"""What a model is made of and what one row of it costs: parameters, non-zeros, multiply-adds; and whether it is quantized already.

Counts are true anywhere, so they stand in a version's card. Nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from optimizers.onnx_file import graphs, in_order, tensors

Shapes = Mapping[str, tuple[int, ...]]
SMALL: Final = 1024
"""Tensors of at most this many elements keep their values for shape inference: they may be shapes."""
WEIGHT_TYPES: Final = frozenset({
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8,
    TensorProto.INT16, TensorProto.UINT16, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2,
})  # fmt: skip
QUANTIZERS: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})
WEIGHT_ONLY: Final = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"})
CONVOLUTIONS: Final = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "NhwcConv", "ConvInteger", "QLinearConv"})
PRODUCTS: Final = frozenset(
    {
        "MatMul",
        "FusedMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QLinearMatMul",
        "DynamicQuantizeMatMul",
        "Gemm",
        "FusedGemm",
        "QGemm",
    }
)


@dataclass(frozen=True)
class Census:
    """Counts of one model. `multiply_adds` is for one row; None where a layer's shape could not be told."""

    nodes: int
    op_types: dict[str, int]
    parameters: int
    nonzeros: int
    weight_bytes: int
    multiply_adds: int | None


def census(model: ModelProto, folder: Path | None = None, row: Shapes | None = None) -> Census:
    """Count `model`, whose external data (if not in memory) lies in `folder`. `row`: shapes of the inputs of one row."""
    parameters = nonzeros = size_bytes = 0
    skipped, zero_points = _quantizer_constants(model)
    for tensor in tensors(model):
        if tensor.name in skipped or not tensor.dims or not (tensor.data_type in WEIGHT_TYPES or tensor.name in zero_points):
            continue
        values = numpy_helper.to_array(tensor, str(folder) if folder else "")
        parameters += values.size
        size_bytes += values.nbytes
        nonzeros += int(np.count_nonzero(values != zero_points.get(tensor.name, 0)))
    op_types: dict[str, int] = {}
    for graph in graphs(model.graph):
        for node in graph.node:
            op_types[node.op_type] = op_types.get(node.op_type, 0) + 1
    return Census(sum(op_types.values()), op_types, parameters, nonzeros, size_bytes, multiply_adds(model, row))


def _quantizer_constants(model: ModelProto) -> tuple[set[str], dict[str, Any]]:
    """Names of scales and zero points, which are no parameters; and of quantized weights, with the value that means zero."""
    small = {t.name: t for t in model.graph.initializer if math.prod(t.dims) <= SMALL and not t.external_data}
    skipped: set[str] = set()
    zero_points: dict[str, Any] = {}
    initializers = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in QUANTIZERS:
            skipped.update(node.input[1:])
            if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
                point = numpy_helper.to_array(small[node.input[2]]) if len(node.input) > 2 and node.input[2] in small else np.zeros(1)
                zero_points[node.input[0]] = point.ravel()[0]
    return skipped, zero_points


def quantization_of(model: ModelProto) -> str:
    """How the model is quantized already ('QDQ', 'integer operators', 'dynamic', 'weights only'), or ''."""
    types = {node.op_type for graph in graphs(model.graph) for node in graph.node}
    if any(kind.startswith("DynamicQuantize") for kind in types):
        return "dynamic"
    if any(kind.startswith("QLinear") or kind in {"ConvInteger", "MatMulInteger", "QGemm", "QAttention"} for kind in types):
        return "integer operators"
    if "QuantizeLinear" in types:
        return "QDQ"
    if types & WEIGHT_ONLY or "DequantizeLinear" in types:
        return "weights only"
    return ""


def infer_shapes(model: ModelProto, row: Shapes | None = None) -> Shapes:
    """Shapes of all values for one row (inputs shaped as in `row`); a value whose shape is not wholly known is left out.

    Large weights are not copied.
    """
    skeleton = ModelProto()
    skeleton.CopyFrom(_without_weights(model))
    weights = {tensor.name for tensor in skeleton.graph.initializer}
    for value in skeleton.graph.input:
        if value.name in weights:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                given = (row or {}).get(value.name, (1,))
                if axis < len(given):
                    dim.dim_value = given[axis]
    for output in skeleton.graph.output:
        output.type.tensor_type.ClearField("shape")
    del skeleton.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    found = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in shape.dim):
            found.setdefault(value.name, tuple(dim.dim_value for dim in shape.dim))
    return found


def _without_weights(model: ModelProto) -> ModelProto:
    bare = ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    graph.node.extend(in_order(model.graph))
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for node in graph.node:
        if node.op_type == "MatMulNBits":  # ONNX's shape inference does not know it
            _as_product(graph, node)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return bare


def _as_product(graph: GraphProto, node: NodeProto) -> None:
    """A product with 4-bit weights [K, N] as the plain one of the same shapes."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    weight = f"{node.output[0]}.weight"
    graph.initializer.add(name=weight, data_type=TensorProto.FLOAT, dims=(sizes["K"], sizes["N"]))
    values, output = node.input[0], node.output[0]
    node.Clear()
    node.op_type = "MatMul"
    node.input.extend((values, weight))
    node.output.append(output)


def multiply_adds(model: ModelProto, row: Shapes | None = None) -> int | None:
    """Multiply-adds of convolutions, matrix products and recurrent layers for one row; None where a shape is unknown."""
    costs = [cost for _, cost in layer_costs(model, row)]
    return None if None in costs else sum(cost or 0 for cost in costs)


def layer_costs(model: ModelProto, row: Shapes | None = None) -> list[tuple[NodeProto, int | None]]:
    """Every node that multiplies weights or activations, with its multiply-adds for one row (None where a shape is unknown)."""
    shapes = infer_shapes(model, row)
    costs = [(node, _cost(node, shapes)) for node in model.graph.node]
    return [(node, cost) for node, cost in costs if cost != 0]


def _cost(node: NodeProto, shapes: Shapes) -> int | None:
    """Multiply-adds of one node; 0 for one that has none to speak of."""
    kind = node.op_type
    if kind in CONVOLUTIONS:
        return _convolution(shapes.get(node.output[0]), shapes.get(node.input[3 if kind == "QLinearConv" else 1]))
    if kind == "ConvTranspose":
        return _convolution(shapes.get(node.input[0]), shapes.get(node.input[1]))
    if kind in PRODUCTS:
        left, out = shapes.get(node.input[0]), shapes.get(node.output[0])
        if left is None or out is None:
            return None
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(out) * (left[-2] if transposed and len(left) > 1 else left[-1])
    if kind == "MatMulNBits":
        out = shapes.get(node.output[0])
        inner = next(a.i for a in node.attribute if a.name == "K")
        return None if out is None else math.prod(out) * inner
    if kind in {"LSTM", "GRU", "RNN"}:
        steps, weight, recurrent = (shapes.get(name) for name in node.input[:3])
        if steps is None or weight is None or recurrent is None:
            return None
        return steps[0] * steps[1] * (math.prod(weight) + math.prod(recurrent))
    return 0


def _convolution(output: Sequence[int] | None, weight: Sequence[int] | None) -> int | None:
    """Every element of the output takes one product per weight of its filter."""
    if output is None or weight is None:
        return None
    return math.prod(output) * math.prod(weight[1:])
