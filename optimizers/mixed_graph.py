"""Mixed precision on the ONNX graph: int8 and 16-bit activations by QDQ, float16 and 4-bit weights by a Cast (and a Mul) before the layer.

ONNX Runtime computes Cast and Mul of constants once, when it loads the file; a DequantizeLinear in their place it would compute in every call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

from optimizers.allotment import Choice, Chosen, TooTight, allot
from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.calibration import Range
from optimizers.census import layer_costs, quantization_of
from optimizers.int8 import Form, Int8StaticConfig, form_for
from optimizers.layer_times import seconds_of
from optimizers.layers import LINEAR, Layer, weighted_layers
from optimizers.mixed import MixedPrecisionConfig
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import initializers, load, save, upgrade_opset
from optimizers.prepare import prepared
from optimizers.qdq import Job, activation_ranges, planned, quantized
from optimizers.samples import Samples
from optimizers.trial import Trial, matching
from optimizers.uniform import quantize, symmetric_grid

WIDE_OPSET: Final = 21
"""The first operator set whose QuantizeLinear knows 16 bits and whose Cast knows 4."""
CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
WEIGHT_BITS: Final = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}
OPERATION_BITS: Final = {"int4": 32 * 32, "int8": 8 * 8, "float16": 32 * 32, "float32": 32 * 32}
"""Bits multiplied with bits: 4-bit and float16 weights are float32 again before the product."""


@dataclass(frozen=True)
class _Work:
    """The prepared float model, its layers, and what it takes to make them int8."""

    job: Job
    layers: tuple[Layer, ...]
    ranges: dict[str, Range]
    trial: Trial
    config: MixedPrecisionConfig
    multiply_adds: dict[str, int]
    seconds: dict[str, tuple[float, float]]
    """(float32, int8) of each layer, where time is what counts."""

    @property
    def model(self) -> ModelProto:
        return self.job.model

    def tick(self, step: str, share: float) -> None:
        self.job.budget.tick(self.config.method, step, share)


def build(artifact: Artifact, config: MixedPrecisionConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact in mixed precision. Raises NotApplicable with the reason."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): mixed-precision needs a float model")
    taken = matching(samples, source, config.samples, config.method)
    ready = prepared(source, folder)
    form = _form(config, budget)
    work = _work(upgrade_opset(ready.model, WIDE_OPSET), config, form, taken, budget, folder)
    precisions, measured = _precisions(work)
    if set(precisions.values()) <= {"float32"}:
        raise NotApplicable(f"every layer stays float32 at a share of {config.share:g}: take a smaller share, or other precisions")
    budget.tick(config.method, "quantizing", 0.9)
    model = rewritten(work, precisions)
    error = work.trial.checked_error(model, "take a larger share, or exclude the most sensitive layers")
    path = save(model, folder / "model.onnx")
    facts = {
        "method": config.method, "form": config.form, "target": form.target, "proven_here": form.here, "reduce_range": form.reduce_range,
        "precisions": precisions, "layer_seconds": work.seconds, "activation_bits": 16 if form.wide_activations else 8, "measured": measured, "output_error": error,
        "calibration": config.calibration, "calibration_samples": len(taken), "calibration_origin": samples.origin,
        "calibration_hashes": taken.hashes(), "prepared": ready.facts, "bytes_before": size_of(artifact.path),
        "bytes": size_of(path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def _form(config: MixedPrecisionConfig, budget: Budget) -> Form:
    form = form_for(budget.target, "auto")
    if config.form != "w8a16":
        return form
    return Form(False, form.signed_activations, form.target, form.here, wide_activations=True)  # computed in float: nothing saturates


def _work(model: ModelProto, config: MixedPrecisionConfig, form: Form, samples: Samples, budget: Budget, folder: Path) -> _Work:
    """Raises NotApplicable where there is nothing to quantize, or nothing to mix."""
    layers = weighted_layers(model, exclude=config.exclude)
    kept = _kept_from_int8(layers, config)
    int8 = Int8StaticConfig(calibration=config.calibration, samples=config.samples, exclude=(*config.exclude, *kept))
    job = planned(save_and_reload_model_with_shape_infer(model), int8, form, samples, budget, folder)
    ranges = activation_ranges(job)
    row = samples.row_shapes()
    costs = {node.name: cost for node, cost in layer_costs(model, row) if cost is not None}
    seconds = _seconds(job, layers, config, form, row)
    return _Work(job, tuple(layers), ranges, Trial.of(job.model, samples, folder, budget.threads), config, costs, seconds)


def _seconds(
    job: Job, layers: Sequence[Layer], config: MixedPrecisionConfig, form: Form, row: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, float]]:
    if config.form != "sensitivity" or config.count != "time":
        return {}
    if not form.here:
        raise NotApplicable(f"count=time measures on this host, which is no {form.target}: take count=operations")
    job.budget.tick(config.method, "timing layers", 0.3)
    return seconds_of(job.model, layers, row, form.signed_activations, job.budget.folder(f"{config.method}-times"), job.budget.threads)


def _kept_from_int8(layers: Sequence[Layer], config: MixedPrecisionConfig) -> list[str]:
    if config.form == "sensitivity":
        return [] if "int8" in config.precisions else [layer.name for layer in layers[1:]]
    if config.form == "w8a16":
        return []
    linear = [layer.name for layer in layers if layer.kind in LINEAR]
    if not linear or len(linear) == len([layer for layer in layers if layer.kind != "Gather"]):
        raise NotApplicable("conv8-linear16 is for models with convolutions and linear layers: take int8-static or w8a16")
    return linear


def _precisions(work: _Work) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Layer to its precision; and, by sensitivity, layer to precision to the error of the outputs when it alone has it."""
    if work.config.form == "w8a16":
        return dict.fromkeys(work.job.layers, "int8"), {}
    if work.config.form == "conv8-linear16":
        rest = dict.fromkeys((layer.name for layer in work.layers), "float32") | dict.fromkeys(work.job.layers, "int8")
        return rest | {layer.name: "float16" for layer in work.layers if layer.kind in LINEAR}, {}
    measured = _measured(work)
    table = {layer.name: _choices(work, layer, measured[layer.name]) for layer in work.layers}
    whole = sum(_cost(work, layer, "float32") for layer in work.layers)
    try:
        chosen: Chosen = allot(table, int(work.config.share * whole), work.config.allot)
    except TooTight as error:
        raise NotApplicable(f"a share of {work.config.share} of float32 {work.config.count} is too small: {error}") from None
    return {layer: choice.name for layer, choice in chosen.items()}, measured


def _measured(work: _Work) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {}
    for at, layer in enumerate(work.layers):
        measured[layer.name] = {}
        for precision in work.config.precisions:
            work.tick(f"{layer.name} in {precision}", 0.4 + 0.5 * at / len(work.layers))
            if precision != "int8" or layer.name in work.job.layers:
                error = 0.0 if precision == "float32" else work.trial.error(_alone(work, layer, precision))
                measured[layer.name][precision] = error
    return measured


def _alone(work: _Work, layer: Layer, precision: str) -> ModelProto:
    if precision == "int8":
        return quantized(work.job, work.ranges, only=[layer.name])
    copy = ModelProto()
    copy.CopyFrom(work.model)
    return lowered(copy, {layer: precision})


def _choices(work: _Work, layer: Layer, measured: Mapping[str, float]) -> list[Choice]:
    return [Choice(precision, _cost(work, layer, precision), error**2) for precision, error in measured.items()]


def _cost(work: _Work, layer: Layer, precision: str) -> int:
    if work.config.count == "bytes":
        scales = 4 * layer.shape[layer.output_axis] if precision.startswith("int") else 0
        return -(-WEIGHT_BITS[precision] * layer.size // 8) + scales
    if work.config.count == "time":
        return round(1e9 * work.seconds[layer.name][precision == "int8"])
    return work.multiply_adds.get(layer.name, layer.size) * OPERATION_BITS[precision]


def rewritten(work: _Work, precisions: Mapping[str, str]) -> ModelProto:
    """The model with each layer in its precision; activations stay float where no layer is int8."""
    int8 = [name for name, precision in precisions.items() if precision == "int8"]
    if int8:
        model = quantized(work.job, work.ranges, keep=[name for name in work.job.layers if name not in int8])
    else:
        model = ModelProto()
        model.CopyFrom(work.model)
    return lowered(model, {layer: precisions[layer.name] for layer in work.layers if layer.name in precisions})


def lowered(model: ModelProto, precisions: Mapping[Layer, str]) -> ModelProto:
    """Weights in float16 or 4 bits in place; their names stay, as outputs of the node that makes them float again."""
    weights, nodes = initializers(model.graph), []
    for layer, precision in precisions.items():
        tensor = weights.get(layer.tensor)
        if tensor is None or precision not in {"float16", "int4"}:
            continue
        weight = numpy_helper.to_array(tensor)
        stored = f"{layer.tensor}.{precision}"
        if precision == "float16":
            limit = float(np.finfo(np.float16).max)
            tensor.CopyFrom(numpy_helper.from_array(np.clip(weight, -limit, limit).astype(np.float16), stored))
            nodes.append(helper.make_node("Cast", [stored], [layer.tensor], f"{stored}.cast", to=TensorProto.FLOAT))
            continue
        grid = symmetric_grid(weight, 4, layer.output_axis)
        shape = [-1 if axis == layer.output_axis else 1 for axis in range(weight.ndim)]
        scale = numpy_helper.from_array(grid.scale.astype(np.float32).reshape(shape), f"{stored}.scale")
        tensor.CopyFrom(nibbles(stored, np.asarray(quantize(weight, grid))))
        model.graph.initializer.append(scale)
        nodes.append(helper.make_node("Cast", [stored], [f"{stored}.codes"], f"{stored}.cast", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{stored}.codes", scale.name], [layer.tensor], f"{stored}.scaled"))
    nodes += [type(node).FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def nibbles(name: str, values: Any) -> TensorProto:
    """Integers from −8 to 7 as INT4, two in a byte, the first in the lower half."""
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.int64)).astype(np.int8).view(np.uint8) & 15
    return helper.make_tensor(name, TensorProto.INT4, values.shape, (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)
