"""A small toolkit over ONNX graphs, shared by every method that rewrites one: load, save, constants, and the clean-ups before a rewrite.

Models come in memory with their external data; what a file is made of is optimizers.onnx_file's, what it costs optimizers.census's.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from optimizers.base import NotApplicable
from optimizers.onnx_file import STANDARD_DOMAINS, graphs, in_order, read

_SOURCE: Final = re.compile(r"/project/onnx/\S+:\d+: ")
EXTERNAL_ABOVE: Final = 1 << 30
"""Files larger than this many bytes are written with external data: protobuf ends at 2 GiB, and some readers before."""
QDQ_OPSET: Final = 13
"""The first operator set with per-channel QuantizeLinear."""
Array = NDArray[Any]


def load(path: Path) -> ModelProto:
    """The model at `path` with its external data in memory. Raises Rejected for a file that optimizers.onnx_file refuses."""
    model = read(path).model
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


def save(model: ModelProto, path: Path) -> Path:
    """Write `model`; the same model gives the same bytes. Beyond EXTERNAL_ABOVE the weights go to `<name>.data` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if weight_bytes(model) > EXTERNAL_ABOVE:
        data = f"{path.name}.data"
        (path.parent / data).unlink(missing_ok=True)
        onnx.save_model(model, str(path), save_as_external_data=True, location=data, size_threshold=1024)
        onnx.load_external_data_for_model(model, str(path.parent))
        return path
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(scratch, path)
    return path


def weight_bytes(model: ModelProto) -> int:
    return sum(tensor.ByteSize() for tensor in model.graph.initializer)


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def constants(graph: GraphProto) -> dict[str, Array]:
    """Every constant by name: initializers and the outputs of Constant nodes."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def set_constant(graph: GraphProto, name: str, value: Array) -> None:
    """Replace the initializer `name`, or add it."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
    for existing in graph.initializer:
        if existing.name == name:
            existing.CopyFrom(tensor)
            return
    graph.initializer.append(tensor)


def attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Value name to the nodes of this graph that read it."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in filter(None, node.input):
            found.setdefault(name, []).append(node)
    return found


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    return {name: node for node in graph.node for name in node.output if name}


def opset(model: ModelProto) -> int:
    """Version of the standard operator set."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), default=0)


def sort_nodes(model: ModelProto) -> None:
    """Put producers before consumers, as the format demands and ONNX Runtime's quantizer does not."""
    ordered = [NodeProto.FromString(node.SerializeToString()) for node in in_order(model.graph)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def strip_initializer_inputs(model: ModelProto) -> list[str]:
    """Take weights off the list of graph inputs (old exporters put them there): tools then see that they are constants.

    Returns their names. Callers can no longer override them.
    """
    weights = set(initializers(model.graph))
    kept = [value for value in model.graph.input if value.name not in weights]
    names = [value.name for value in model.graph.input if value.name in weights]
    if names:
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.ir_version = max(model.ir_version, 4)  # before 4 every initializer had to be an input
    return names


def name_nodes(model: ModelProto) -> None:
    """Give every node a name of its own, so that it can be excluded, reported and rewritten by it."""
    taken = Counter(node.name for node in model.graph.node if node.name)
    used: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in used:
            name = f"{node.op_type}_{index}"
            while name in taken or name in used:
                name += "_"
            node.name = name
        used.add(node.name)


def constants_to_initializers(model: ModelProto) -> int:
    """Turn Constant nodes of the main graph into initializers, which is where every tool looks for weights."""
    moved = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"]
    for node in moved:
        tensor = TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    return len(moved)


def drop_unused_initializers(model: ModelProto) -> int:
    """Remove initializers that nothing reads, subgraphs included; returns how many."""
    read_names = {name for graph in graphs(model.graph) for node in graph.node for name in node.input}
    read_names |= {value.name for graph in graphs(model.graph) for value in graph.output}
    unused = [tensor for tensor in model.graph.initializer if tensor.name not in read_names]
    for tensor in unused:
        model.graph.initializer.remove(tensor)
    return len(unused)


def upgrade_opset(model: ModelProto, least: int = QDQ_OPSET) -> ModelProto:
    """`model` in operator set `least` or later. Raises NotApplicable where the converter cannot, naming what it said."""
    if opset(model) >= least:
        return model
    strip_initializer_inputs(model)
    try:
        converted: ModelProto = onnx.version_converter.convert_version(model, least)
    except (RuntimeError, ValueError) as error:
        raise NotApplicable(
            f"the model is in operator set {opset(model)} and cannot be brought to {least}: {_SOURCE.sub('', ' '.join(str(error).split()))[:300]}"
        ) from None
    return converted


def fold_batchnorm(model: ModelProto) -> int:
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it; returns how many.

    y = γ (Wx + b − μ) / √(σ² + ε) + β, so W' = W γ/√(σ² + ε) per output channel and b' = β + (b − μ) γ/√(σ² + ε).
    """
    graph = model.graph
    values, made_by, read_by = constants(graph), producers(graph), consumers(graph)
    outputs = {value.name for value in graph.output}
    folded = 0
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        layer = made_by.get(norm.input[0])
        if layer is None or not _foldable(layer, norm, values, read_by, outputs):
            continue
        _fold(graph, layer, norm, values)
        made_by[norm.output[0]] = layer
        folded += 1
    if folded:
        drop_unused_initializers(model)
    return folded


def _foldable(
    layer: NodeProto, norm: NodeProto, values: Mapping[str, Array], read_by: Mapping[str, list[NodeProto]], outputs: set[str]
) -> bool:
    if layer.op_type not in {"Conv", "ConvTranspose", "Gemm"} or attributes(norm).get("training_mode", 0):
        return False
    if any(name not in values for name in (*norm.input[1:5], layer.input[1], *filter(None, layer.input[2:3]))):
        return False
    if len(read_by.get(norm.input[0], ())) != 1 or norm.input[0] in outputs or len([name for name in norm.output if name]) != 1:
        return False
    gemm = attributes(layer) if layer.op_type == "Gemm" else {}
    return gemm.get("alpha", 1.0) == 1.0 and gemm.get("beta", 1.0) == 1.0 and values[layer.input[1]].dtype == np.float32


def _fold(graph: GraphProto, layer: NodeProto, norm: NodeProto, values: dict[str, Array]) -> None:
    scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:5])
    weight = values[layer.input[1]].astype(np.float64)
    bias = values[layer.input[2]].astype(np.float64) if len(layer.input) > 2 and layer.input[2] else np.zeros_like(mean)
    factor = scale / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
    new_weight = (weight * _along_outputs(layer, weight, factor)).astype(np.float32)
    new_bias = (shift + (bias - mean) * factor).astype(np.float32)
    names = f"{norm.output[0]}.folded_weight", f"{norm.output[0]}.folded_bias"  # the old ones may be shared with other layers
    for name, value in zip(names, (new_weight, new_bias), strict=True):
        set_constant(graph, name, value)
        values[name] = value
    del layer.input[1:]
    layer.input.extend(names)
    layer.output[0] = norm.output[0]
    graph.node.remove(norm)


def _along_outputs(layer: NodeProto, weight: Array, factor: Array) -> Array:
    """`factor` per output channel, shaped to multiply `weight`."""
    if layer.op_type == "Conv":
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    if layer.op_type == "Gemm":
        return factor.reshape(-1, 1) if attributes(layer).get("transB", 0) else factor.reshape(1, -1)
    groups = attributes(layer).get("group", 1)  # ConvTranspose: [in, out / groups, ...]
    per_group = factor.reshape(groups, 1, -1)
    spread = np.broadcast_to(per_group, (groups, weight.shape[0] // groups, weight.shape[1])).reshape(weight.shape[:2])
    return spread.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
