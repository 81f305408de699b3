"""A float model rewritten so that it quantizes better, with the same answers: ranges evened out between layers, or from activations to weights;
and biases that take back what rounding the weights shifts on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from optimizers.layers import LINEAR, Inputs, Layer, weighted_layers
from optimizers.onnx_graph import attributes, consumers, initializers, producers, set_constant

SCALES_ALONG: Final = frozenset({"Relu", "LeakyRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten"})
"""f(s·x) = s·f(x) for s > 0, channel by channel; a Flatten where there are as many values as channels."""
ROUNDS: Final = 4
LIMITS: Final = (1e-3, 1e3)
"""Factors stay within these: what was never active would be scaled without bound."""
Array = NDArray[Any]


def cross_layer(model: ModelProto) -> list[tuple[str, str]]:
    """Even out the ranges of each two layers in a row; returns their names. Nagel et al. 2019 (arXiv:1906.04721), section 4.1:

    W₁ᵢ ← W₁ᵢ / sᵢ, b₁ᵢ ← b₁ᵢ / sᵢ, W₂ᵢ ← W₂ᵢ · sᵢ with sᵢ = √(r₁ᵢ / r₂ᵢ), so that both ranges of channel i become √(r₁ᵢ r₂ᵢ).
    """
    pairs = _pairs(model)
    weights = {layer.tensor: _float(model, layer.tensor) for pair in pairs for layer in pair}
    biases = {name: _float(model, name) for name in filter(None, (_bias(model, first) for first, _ in pairs))}
    for _ in range(ROUNDS):
        for first, second in pairs:
            one = np.abs(weights[first.tensor]).max(axis=_others(first))
            two = _input_peaks(second, weights[second.tensor])
            scale = np.where((one > 0) & (two > 0), np.sqrt(one / np.where(two > 0, two, 1)), 1.0).clip(*LIMITS)
            weights[first.tensor] = weights[first.tensor] / _along(first, scale)
            weights[second.tensor] = weights[second.tensor] * second.spread(scale)
            if bias := _bias(model, first):
                biases[bias] = biases[bias] / scale
    for name, values in {**weights, **biases}.items():
        set_constant(model.graph, name, values.astype(np.float32))
    return [(first.name, second.name) for first, second in pairs]


def smooth(model: ModelProto, inputs: Mapping[str, Inputs], alpha: float) -> list[str]:
    """Move range from activations to weights of linear layers; returns their names. Xiao et al. 2022 (arXiv:2211.10438), equation 4:

    X ← X / s, W ← s · W with s_j = max|X_j|^α / max|W_j|^(1−α). The division goes into the normalization before, else it is a Mul of its own.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in _alone(model, [each for each in weighted_layers(model, LINEAR) if each.name in inputs and len(each.shape) == 2]):
        groups.setdefault(layer.source, []).append(layer)
    for source, layers in groups.items():
        peak = inputs[layers[0].name].peak
        weight = np.max([_input_peaks(layer, _float(model, layer.tensor)) for layer in layers], axis=0)
        scale = np.where((peak > 0) & (weight > 0), np.maximum(peak, 1e-30) ** alpha / np.maximum(weight, 1e-30) ** (1 - alpha), 1.0).clip(
            *LIMITS
        )
        for layer in layers:
            set_constant(model.graph, layer.tensor, (_float(model, layer.tensor) * layer.spread(scale)).astype(np.float32))
        if not _folded(model, source, {layer.name for layer in layers}, scale):
            _divide(model, source, {layer.name for layer in layers}, scale)
    return [layer.name for layers in groups.values() for layer in layers]


def correct_biases(model: ModelProto, quantized: ModelProto, layers: Sequence[Layer], inputs: Mapping[str, Inputs]) -> list[str]:
    """Take α E[(Ŵ − W) x] off each layer's bias, as the weights of `quantized` are; returns the layers. Nagel et al. 2019, section 4.2.

    E[x] is the mean of each input channel over the samples; a border of zeros is not counted. α is a Gemm's, 1 for others.
    """
    rounded = _dequantized(quantized)
    corrected = []
    for layer in _alone(model, [each for each in layers if each.kind in {"Conv", "Gemm"} and each.name in inputs]):
        node = next(node for node in model.graph.node if node.name == layer.name)
        given = attributes(node)
        if layer.tensor not in rounded or given.get("beta", 1.0) != 1.0:
            continue
        error = rounded[layer.tensor] - _float(model, layer.tensor)
        shift = given.get("alpha", 1.0) * (error * layer.spread(inputs[layer.name].mean)).sum(axis=_others(layer))
        name = f"{layer.tensor}.corrected_bias"
        bias = _float(model, node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(len(shift))
        set_constant(model.graph, name, (bias - shift).astype(np.float32))
        kept = list(node.input[:2])
        del node.input[:]
        node.input.extend([*kept, name])
        corrected.append(layer.name)
    return corrected


def _pairs(model: ModelProto) -> list[tuple[Layer, Layer]]:
    """Layers in a row with nothing between them that minds a factor per channel, and no other reader of what lies between."""
    layers = {each.name: each for each in _alone(model, weighted_layers(model, {"Conv", "Gemm", "MatMul"}))}
    read_by, outputs = consumers(model.graph), {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        first = layers.get(node.name)
        if first is None or (first.kind == "Gemm" and not _plain(node)):
            continue
        value = node.output[0]
        while value not in outputs and len(read_by.get(value, ())) == 1 and (reader := read_by[value][0]).op_type in SCALES_ALONG:
            value = reader.output[0]
        readers = read_by.get(value, []) if value not in outputs else []
        second = layers.get(readers[0].name) if len(readers) == 1 else None
        if second is not None and second.source == value and _width(first) == _inputs(second):
            found.append((first, second))
    return found


def _alone(model: ModelProto, layers: Sequence[Layer]) -> list[Layer]:
    """Those whose weight and bias nothing else reads, and whose bias (if any) is a constant vector as long as the outputs."""
    read_by, weights = consumers(model.graph), initializers(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    kept = []
    for layer in layers:
        constants = list(filter(None, nodes[layer.name].input[1:]))
        if all(name in weights and len(read_by[name]) == 1 for name in constants) and all(
            tuple(weights[name].dims) == (_width(layer),) for name in constants[1:]
        ):
            kept.append(layer)
    return kept


def _plain(node: NodeProto) -> bool:
    return bool(attributes(node).get("alpha", 1.0) == attributes(node).get("beta", 1.0) == 1.0)


def _width(layer: Layer) -> int:
    return layer.shape[layer.output_axis]


def _inputs(layer: Layer) -> int:
    return layer.shape[1] * layer.groups if layer.kind == "Conv" else layer.size // _width(layer)


def _others(layer: Layer) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(layer.shape)) if axis != layer.output_axis)


def _along(layer: Layer, per_output: Array) -> Array:
    return per_output.reshape([-1 if axis == layer.output_axis else 1 for axis in range(len(layer.shape))])


def _input_peaks(layer: Layer, weight: Array) -> Array:
    """Largest magnitude among the weights that multiply each input channel."""
    if layer.kind != "Conv":
        return np.asarray(np.abs(weight).max(axis=layer.output_axis))
    grouped = np.abs(weight).reshape(layer.groups, layer.shape[0] // layer.groups, layer.shape[1], -1)
    return np.asarray(grouped.max(axis=(1, 3)).ravel())


def _bias(model: ModelProto, layer: Layer) -> str:
    node = next(node for node in model.graph.node if node.name == layer.name)
    return str(node.input[2]) if len(node.input) > 2 else ""


def _float(model: ModelProto, name: str) -> Array:
    return numpy_helper.to_array(initializers(model.graph)[name]).astype(np.float64)


def _folded(model: ModelProto, source: str, readers: set[str], scale: Array) -> bool:
    """Divide by `scale` in the scale and shift that make `source`, where only `readers` read it."""
    read_by, made_by, weights = consumers(model.graph), producers(model.graph), initializers(model.graph)
    outputs = {value.name for value in model.graph.output}
    vectors: list[str] = []
    while (node := made_by.get(source)) is not None and source not in outputs and {each.name for each in read_by[source]} <= readers:
        found = [
            name for name in node.input[1:] if name in weights and tuple(weights[name].dims) == scale.shape and len(read_by[name]) == 1
        ]
        if node.op_type not in {"LayerNormalization", "Add", "Mul"} or len(found) != len(node.input) - 1:
            return False
        vectors += found
        if node.op_type != "Add":
            for name in vectors:
                set_constant(model.graph, name, (_float(model, name) / scale).astype(np.float32))
            return True
        source, readers = node.input[0], {node.name}
    return False


def _divide(model: ModelProto, source: str, readers: set[str], scale: Array) -> None:
    name = f"{source}.smoothed"
    set_constant(model.graph, f"{name}.factor", (1 / scale).astype(np.float32))
    at = next(index for index, node in enumerate(model.graph.node) if node.name in readers)
    for node in model.graph.node:
        if node.name in readers:
            node.input[0] = name
    model.graph.node.insert(at, helper.make_node("Mul", [source, f"{name}.factor"], [name], name))


def _dequantized(model: ModelProto) -> dict[str, Array]:
    """Weights of a QDQ model as they will be multiplied, by the name of the float weight."""
    weights, found = initializers(model.graph), {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in weights:
            continue
        codes, scale, zero = (_float(model, name) for name in node.input[:3])
        shape = [1] * codes.ndim
        if scale.ndim and scale.size > 1:
            shape[attributes(node).get("axis", 1)] = -1
        found[node.input[0].removesuffix("_quantized")] = (codes - zero.reshape(shape)) * scale.reshape(shape)
    return found
