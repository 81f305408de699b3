"""Linear layers as com.microsoft.MatMulNBits: weights stay 4 bits in memory and are unpacked block by block while multiplying."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.census import quantization_of
from optimizers.int4 import COMPUTE, Int4LinearConfig
from optimizers.layers import LINEAR, Layer, elsewhere, weighted_layers
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import attributes, drop_unused_initializers, initializers, load, save
from optimizers.prepare import prepared
from optimizers.samples import Samples
from optimizers.trial import Trial, matching

DOMAIN: Final = "com.microsoft"
LEVELS: Final = 15
Array = NDArray[Any]


def build(artifact: Artifact, config: Int4LinearConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with 4-bit linear layers. Raises NotApplicable with the reason."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): int4-linear needs a float model")
    ready = prepared(source, folder)
    model = ready.model
    layers = _layers(model, config)
    if not layers:
        raise NotApplicable(
            f"no MatMul or Gemm multiplies by a constant float matrix of at least {config.least} weights and {config.block} inputs{elsewhere(model)}"
        )
    trial = Trial.of(model, matching(samples, model, len(samples), config.method), folder, budget.threads) if len(samples) else None
    for at, layer in enumerate(layers):
        budget.tick(config.method, f"quantizing {layer.name}", 0.1 + 0.8 * at / len(layers))
        _rewrite(model, layer, config)
    drop_unused_initializers(model)
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    error = trial.checked_error(model, "take smaller blocks, or exclude layers") if trial else None
    path = save(model, folder / "model.onnx")
    facts = {
        "method": config.method, "layers": [layer.name for layer in layers], "block": config.block, "symmetric": config.symmetric,
        "compute": config.compute, "domains": [DOMAIN], "output_error": error, "prepared": ready.facts,
        "bytes_before": size_of(artifact.path), "bytes": size_of(path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def blockwise(weight: Array, block: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes 0..15 [n, blocks, block] of `weight` [k, n] (the last block filled up), scales and zero points [n, blocks]."""
    k, n = weight.shape
    blocks = -(-k // block)
    filled = np.zeros((n, blocks * block))
    filled[:, :k] = weight.T
    values = filled.reshape(n, blocks, block)
    if symmetric:
        scale, zero = np.abs(values).max(axis=2) / 7, np.full((n, blocks), 8.0)
    else:
        low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
        scale = (high - low) / LEVELS
        zero = np.rint(-low / np.where(scale > 0, scale, 1))
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    codes = np.clip(np.rint(values / scale[..., None]) + zero[..., None], 0, LEVELS)
    return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def _layers(model: ModelProto, config: Int4LinearConfig) -> list[Layer]:
    found = weighted_layers(model, LINEAR, config.exclude, config.least)
    plain = {node.name for node in model.graph.node if attributes(node).get("alpha", 1.0) == attributes(node).get("beta", 1.0) == 1.0}
    return [
        layer for layer in found if len(layer.shape) == 2 and layer.name in plain and layer.shape[1 - layer.output_axis] >= config.block
    ]


def _rewrite(model: ModelProto, layer: Layer, config: Int4LinearConfig) -> None:
    """Every node that multiplies by this layer's weight reads the blocks instead; a Gemm's bias is added after."""
    weight = numpy_helper.to_array(initializers(model.graph)[layer.tensor])
    weight = weight.T if layer.transposed else weight
    codes, scale, zero = blockwise(weight, config.block, config.symmetric)
    names = [f"{layer.tensor}.{part}" for part in ("blocks", "scales", *([] if config.symmetric else ["zeros"]))]
    packed = [codes[..., ::2] | codes[..., 1::2] << 4, scale.ravel(), _pairs(zero)]
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in zip(names, packed, strict=False))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type not in LINEAR or node.input[1] != layer.tensor or bool(attributes(node).get("transB", 0)) != layer.transposed:
            nodes.append(node)
            continue
        biased = len(node.input) > 2 and node.input[2]
        out = f"{node.output[0]}.product" if biased else node.output[0]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [node.input[0], *names], [out], node.name, domain=DOMAIN, K=weight.shape[0], N=weight.shape[1],
                bits=4, block_size=config.block, accuracy_level=COMPUTE[config.compute],
            )
        )  # fmt: skip
        if biased:
            nodes.append(helper.make_node("Add", [out, node.input[2]], [node.output[0]], f"{node.name}.bias"))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _pairs(zero: Array) -> Array:
    """Zero points of each output two in a byte, the first in the lower half."""
    even = np.concatenate([zero, np.zeros((len(zero), zero.shape[1] % 2), np.uint8)], axis=1)
    return np.asarray(even[:, ::2] | even[:, 1::2] << 4).ravel()
