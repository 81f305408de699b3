"""Codebooks in an ONNX graph: a weight becomes levels (float), indices (8 bits, or 4 where they suffice), a Cast and a Gather.

Standard operators only. ONNX Runtime computes both nodes once, when it loads the file: memory and speed are those of the float model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optimizers.allotment import Choice, allot
from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.census import quantization_of
from optimizers.clustering import entropy_bits, entropy_constrained, kmeans, kmeans_errors
from optimizers.codebook import CodebookConfig
from optimizers.feedback import as_matrix, assign, from_matrix, gram, suits
from optimizers.layers import Layer, elsewhere, input_statistics, weighted_layers
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import initializers, load, save, set_constant, upgrade_opset
from optimizers.packed import pack
from optimizers.prepare import prepared
from optimizers.samples import Samples
from optimizers.trial import Trial, matching
from optimizers.uniform import BITS

NIBBLES_OPSET: Final = 21
"""The first operator set whose Cast reads 4-bit integers."""
FLOOR_OF_IMPORTANCE: Final = 1e-6
"""Share of a layer's mean importance that every weight has at least: what the samples never used may be used yet."""
Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Coded:
    """One weight as levels and indices. With zeros kept, index 0 is the level 0."""

    layer: Layer
    bits: int
    levels: NDArray[np.float32]
    index: NDArray[np.uint8]

    @property
    def values(self) -> NDArray[np.float32]:
        return self.levels[self.index]


def build(artifact: Artifact, config: CodebookConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with codebooks. Raises NotApplicable with the reason."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): codebook needs a float model")
    ready = prepared(source, folder)
    model = ready.model
    layers = weighted_layers(model, exclude=config.exclude, least=1 << (config.bits + 1))
    if not layers:
        raise NotApplicable(
            f"there is no convolution, matrix product or table with a constant float weight larger than its codebook{elsewhere(model)}"
        )
    weights = {layer.name: numpy_helper.to_array(initializers(model.graph)[layer.tensor]) for layer in layers}
    taken = matching(samples, model, config.samples, "perceptual codebook") if len(samples) or config.levels == "perceptual" else samples
    trial = Trial.of(model, taken, folder, budget.threads) if len(taken) else None
    importance = _importance(model, layers, taken, budget, folder) if config.levels == "perceptual" else {}
    bits, sensitivity = _bits(model, layers, weights, importance, config, trial, budget)
    coded = []
    for at, layer in enumerate(layers):
        budget.tick(config.method, f"clustering {layer.name}", 0.5 + 0.4 * at / len(layers))
        moments = gram(model, layer, taken, folder, budget.threads) if importance and suits(model, layer) else None
        coded.append(code(layer, weights[layer.name], importance.get(layer.name), bits[layer.name], config, moments))
    model = _rewritten(model, coded)
    error = trial.checked_error(model, "take more bits, or exclude the most sensitive layers") if trial else None
    path = save(model, folder / "model.onnx")
    facts = {
        "method": config.method, "levels": config.levels, "layers": [_told(each, weights) for each in coded], "sensitivity": sensitivity,
        "mean_bits": sum(each.bits * each.layer.size for each in coded) / sum(layer.size for layer in layers),
        "output_error": error, "prepared": ready.facts, "bytes_before": size_of(artifact.path), "bytes": size_of(path),
        "bytes_packed": pack(path, folder / "model.packed").bytes, "memory": "that of the float model: the runtime looks the weights up when it loads",
        "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def code(
    layer: Layer,
    weight: NDArray[np.float32],
    importance: NDArray[Any] | None,
    bits: int,
    config: CodebookConfig,
    moments: NDArray[Any] | None = None,
) -> Coded:
    """Levels of one weight, and the index of each element: the nearest, or with the inputs' `moments` E[xxᵀ] by feedback of errors."""
    flat = weight.ravel()
    zero = smallest(flat, config.sparsity)
    rest, count = flat[~zero], (1 << bits) - bool(zero.any())
    if config.levels == "entropy":
        levels = entropy_constrained(rest, count, config.rate)
    else:
        levels = kmeans(rest, count, None if importance is None else importance.ravel()[~zero])
    kept = np.concatenate([np.zeros(int(zero.any())), levels.centres]).astype(np.float32)
    if moments is None:
        codes = levels.codes(flat)
    else:
        mask = as_matrix(layer, zero.reshape(weight.shape))
        found = assign(as_matrix(layer, weight), moments, levels.codes, lambda codes: levels.centres[codes], mask)
        codes = from_matrix(layer, found).ravel()
    index = np.where(zero, 0, codes + bool(zero.any())).astype(np.uint8)
    return Coded(layer, bits, kept, index.reshape(weight.shape))


def smallest(flat: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Where the `share` of smallest weights lies."""
    found = np.zeros(flat.size, bool)
    found[np.argsort(np.abs(flat), kind="stable")[: int(share * flat.size)]] = True
    return found


def _importance(model: ModelProto, layers: Sequence[Layer], samples: Samples, budget: Budget, folder: Path) -> Weights:
    """E[x²] of what each weight multiplies, relative to the layer's mean."""
    inputs = input_statistics(
        model, layers, samples, folder, lambda share: budget.tick("codebook", "input moments", 0.1 + 0.2 * share), budget.threads
    )
    found = {}
    for layer in layers:
        moment = inputs[layer.name].second if layer.name in inputs else np.ones(1)
        mean = float(moment.mean()) or 1.0
        found[layer.name] = layer.spread((moment / mean + FLOOR_OF_IMPORTANCE).astype(np.float32))
    return found


def _bits(
    model: ModelProto, layers: Sequence[Layer], weights: Weights, importance: Weights, config: CodebookConfig, trial: Trial | None, budget: Budget
) -> tuple[dict[str, int], dict[str, float]]:  # fmt: skip
    """Bits of each layer, and the error of the outputs when it alone is coded with `bits` (where that was measured)."""
    fixed = dict(config.layer_bits)
    unknown = sorted(fixed.keys() - {layer.name for layer in layers})
    if unknown:
        raise NotApplicable(f"layer_bits names {unknown[0]!r}, which is no layer with a large weight; there are {', '.join(weights)}")
    if config.levels != "perceptual" or config.allot == "equal" or trial is None:
        return {layer.name: fixed.get(layer.name, config.bits) for layer in layers}, {}
    table, sensitivity = {}, {}
    for at, layer in enumerate(layer for layer in layers if layer.name not in fixed):
        budget.tick(config.method, f"sensitivity of {layer.name}", 0.3 + 0.2 * at / len(layers))
        alone = code(layer, weights[layer.name], importance[layer.name], config.bits, config)
        sensitivity[layer.name] = trial.error(_with(model, {layer.tensor: alone.values}))
        errors = kmeans_errors(weights[layer.name].ravel(), [1 << bits for bits in BITS], importance[layer.name].ravel())
        scale = sensitivity[layer.name] ** 2 / (errors[config.bits - BITS[0]] or 1.0)
        table[layer.name] = [Choice(str(bits), bits * layer.size, scale * error) for bits, error in zip(BITS, errors, strict=True)]
    room = sum(config.bits * layer.size for layer in layers if layer.name in table)
    chosen = allot(table, room, config.allot) if table else {}
    return {layer.name: fixed.get(layer.name) or int(chosen[layer.name].name) for layer in layers}, sensitivity


def _with(model: ModelProto, tensors: Mapping[str, NDArray[Any]]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    for name, values in tensors.items():
        set_constant(copy.graph, name, values)
    return copy


def _rewritten(model: ModelProto, coded: Sequence[Coded]) -> ModelProto:
    """The weights' names stay, as outputs of the look-up, so that whatever reads them is left alone."""
    packs = any(each.bits <= 4 for each in coded)
    try:
        model = upgrade_opset(model, NIBBLES_OPSET) if packs else model
    except NotApplicable:
        packs = False  # the indices take 8 bits each, then
    names = {each.layer.tensor for each in coded}
    kept = [TensorProto.FromString(t.SerializeToString()) for t in model.graph.initializer if t.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = []
    for each in coded:
        name = each.layer.tensor
        model.graph.initializer.append(numpy_helper.from_array(each.levels, f"{name}.levels"))
        model.graph.initializer.append(_index(f"{name}.index", each.index, packs and each.bits <= 4))
        nodes.append(helper.make_node("Cast", [f"{name}.index"], [f"{name}.places"], f"{name}.cast", to=TensorProto.INT32))
        nodes.append(helper.make_node("Gather", [f"{name}.levels", f"{name}.places"], [name], f"{name}.look_up"))
    nodes += [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _index(name: str, index: NDArray[np.uint8], nibbles: bool) -> TensorProto:
    if not nibbles:
        return numpy_helper.from_array(index, name)
    flat = np.append(index.ravel(), np.zeros(index.size % 2, np.uint8))
    return helper.make_tensor(name, TensorProto.UINT4, index.shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)


def _told(each: Coded, weights: Weights) -> dict[str, Any]:
    weight = weights[each.layer.name].astype(np.float64)
    return {
        "layer": each.layer.name, "weights": each.layer.size, "bits": each.bits, "levels": len(each.levels), "entropy_bits": entropy_bits(each.index),
        "zeros": float(np.mean(each.values == 0)), "error": float(np.sqrt(np.mean((weight - each.values) ** 2) / (np.mean(weight**2) or 1.0))),
    }  # fmt: skip
