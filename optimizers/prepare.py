"""A graph made ready for rewriting: weights visible as constants, BatchNormalization folded, constants computed, nodes named.

The answers stay those of the model (up to rounding); what cannot be prepared is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from optimizers.offline import save_optimized
from optimizers.onnx_file import STANDARD_DOMAINS, graphs
from optimizers.onnx_graph import (
    attributes,
    constants,
    constants_to_initializers,
    drop_unused_initializers,
    fold_batchnorm,
    initializers,
    load,
    name_nodes,
    save,
    set_constant,
    strip_initializer_inputs,
    upgrade_opset,
    weight_bytes,
)

GROWTH_ALLOWED: Final = 1.02
"""Computing constants may copy a shared table in another layout; beyond this growth of the weights they stay uncomputed."""


@dataclass(frozen=True)
class Prepared:
    """The graph and what was done to it."""

    model: ModelProto
    facts: dict[str, Any]


def prepared(model: ModelProto, folder: Path) -> Prepared:
    """`model` made ready for quantizers and the like. `folder` is for scratch files. Raises NotApplicable from the opset's converter."""
    stripped = strip_initializer_inputs(model)
    model = upgrade_opset(model)
    constants_to_initializers(model)
    folded = fold_batchnorm(model)
    size = weight_bytes(model)
    basic = _computed(model, folder, skip=())
    if weight_bytes(basic) > GROWTH_ALLOWED * size + 4096:
        basic = _computed(model, folder, skip=("ConstantFolding",))
    constants_to_initializers(basic)
    folded += fold_batchnorm(basic)
    pooled = means_to_pools(basic)
    widened = widen_biases(basic)
    drop_unused_initializers(basic)
    name_nodes(basic)
    tidy_domains(basic)
    facts = {"inputs_made_weights": stripped, "batchnorms_folded": folded, "means_made_pools": pooled, "biases_widened": widened}
    return Prepared(basic, facts)


def _computed(model: ModelProto, folder: Path, skip: tuple[str, ...]) -> ModelProto:
    """ONNX Runtime's basic level: constants computed, dead and doubled nodes gone, standard operators only."""
    return load(save_optimized(save(model, folder / "plain.onnx"), folder / "basic.onnx", "basic", skip))


def tidy_domains(model: ModelProto) -> None:
    """Keep only the operator sets that the nodes use: ONNX Runtime writes down all that it knows."""
    used = {node.domain for graph in graphs(model.graph) for node in graph.node} | {n.domain for f in model.functions for n in f.node}
    kept = [entry for entry in model.opset_import if entry.domain in used or entry.domain in STANDARD_DOMAINS]
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
    del model.opset_import[:]
    model.opset_import.extend(copies)


def means_to_pools(model: ModelProto) -> list[str]:
    """ReduceMean over both image axes is GlobalAveragePool, which has an int8 kernel where the mean has none."""
    values = constants(model.graph)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*model.graph.value_info, *model.graph.input)}
    convolved = {name for node in model.graph.node if node.op_type in {"Conv", "Relu", "Add", "Clip"} for name in node.output}
    changed: list[str] = []
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or attributes(node).get("keepdims", 1) != 1:
            continue
        axes = attributes(node).get("axes") or (values.get(node.input[1], np.array([])).tolist() if len(node.input) > 1 else [])
        rank = ranks.get(node.input[0], 4 if node.input[0] in convolved and sorted(axes) == [-2, -1] else 0)
        if rank == 4 and sorted(axis % 4 for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            del node.input[1:]
            changed.append(node.output[0])
    return changed


def widen_biases(model: ModelProto) -> list[str]:
    """Gemm may broadcast a bias of one element; per-channel quantizers index it by channel, so it is written out."""
    weights = initializers(model.graph)
    changed: list[str] = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[1] not in weights or node.input[2] not in weights:
            continue
        width = _gemm_width(node, weights[node.input[1]])
        dims = tuple(weights[node.input[2]].dims)
        if dims in {(width,)} or (dims and int(np.prod(dims)) not in {1, width}):
            continue
        name = f"{node.output[0]}.bias"
        value = constants(model.graph)[node.input[2]]
        set_constant(model.graph, name, np.broadcast_to(value.reshape(-1), (width,)).copy())
        node.input[2] = name
        changed.append(name)
    return changed


def _gemm_width(node: NodeProto, weight: TensorProto) -> int:
    return int(weight.dims[0 if attributes(node).get("transB", 0) else 1])
