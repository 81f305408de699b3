"""Static int8 in QDQ form: prepare the graph, calibrate, let ONNX Runtime's quantizer rewrite it with our ranges, look at the result.

Borrowed from onnxruntime.quantization is the graph rewriting alone; ranges are optimizers.calibration's, since its own keeps everything.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.calibration import Calibration, Range, calibrate
from optimizers.census import quantization_of
from optimizers.equalize import correct_biases, cross_layer, smooth
from optimizers.int8 import Form, Int8StaticConfig
from optimizers.layers import LINEAR as LINEAR_LAYERS
from optimizers.layers import Inputs, Layer, elsewhere, input_statistics, weighted_layers
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import attributes, initializers, load, save, sort_nodes
from optimizers.prepare import prepared
from optimizers.samples import Samples
from optimizers.trial import HOPELESS, Trial, change, matching

CONVOLUTIONAL: Final = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Resize", "Pad", "Split",
)  # fmt: skip
"""Operators that have int8 kernels worth having on a CPU, so that activations stay int8 between convolutions."""
LINEAR: Final = ("MatMul", "Gemm", "Gather")
"""In models without convolutions only products with constant weights and tables: normalizations and softmax stay float."""
WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})
_ACTIVATIONS: Final = {
    (False, False): QuantType.QUInt8, (False, True): QuantType.QInt8, (True, False): QuantType.QUInt16, (True, True): QuantType.QInt16,
}  # fmt: skip
"""By whether activations have 16 bits, and whether they are signed."""


@dataclass(frozen=True)
class Job:
    """One static quantization: the prepared float model, and what of it is to be quantized how."""

    model: ModelProto
    config: Int8StaticConfig
    form: Form
    samples: Samples
    budget: Budget
    folder: Path
    types: tuple[str, ...]
    excluded: frozenset[str]
    layers: tuple[str, ...]

    def tick(self, step: str, share: float) -> None:
        self.budget.tick(self.config.method, step, share)


def build(artifact: Artifact, config: Int8StaticConfig, form: Form, samples: Samples, budget: Budget) -> Artifact:
    """The artifact in int8. Raises NotApplicable with the reason (and the node)."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): int8-static needs a float model")
    taken = matching(samples, source, config.samples, config.method)
    ready = prepared(source, folder)
    rescue = _evened(ready.model, config, taken, budget, folder)
    job = planned(save_and_reload_model_with_shape_infer(ready.model), config, form, taken, budget, folder)
    job.tick("calibration", 0.1)
    ranges = activation_ranges(job)
    trial = Trial.of(job.model, job.samples, folder, budget.threads)
    sensitive = sensitivity(job, ranges, trial) if config.keep_float else {}
    kept = list(sensitive)[: min(config.keep_float, len(job.layers) - 1)]
    job.tick("quantizing", 0.9)
    model = quantized(job, ranges, keep=kept)
    if config.bias_correction:
        rescue["biases_corrected"] = _correct_biases(job, model, kept)
        model = quantized(job, ranges, keep=kept)
    error = _look(model, job, ranges, trial)
    path = save(model, folder / "model.onnx")
    left = float_left(model, artifact.path, path, {*config.exclude, *kept})
    facts = {
        "method": config.method, "target": form.target, "proven_here": form.here, "reduce_range": form.reduce_range,
        "per_channel": config.per_channel, "calibration": config.calibration, "calibration_samples": len(job.samples),
        "calibration_origin": samples.origin, "calibration_hashes": job.samples.hashes(), "quantized_layers": len(job.layers) - len(kept),
        "kept_float": [*_left_alone(job), *kept], "sensitivity": sensitive, "rescue": rescue,
        "operators": sorted({node.op_type for node in job.model.graph.node} & set(job.types)), "prepared": ready.facts,
        "output_error": error, "bytes_before": size_of(artifact.path), "bytes": size_of(path),
        "float_left": left, "seconds": time.monotonic() - started,
    }  # fmt: skip
    job.tick("done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def _evened(model: ModelProto, config: Int8StaticConfig, samples: Samples, budget: Budget, folder: Path) -> dict[str, Any]:
    """Even out ranges in the float model, as far as asked for; what was done."""
    done: dict[str, Any] = {}
    if config.equalize:
        done["equalized"] = cross_layer(model)
    if config.smooth:
        layers = weighted_layers(model, LINEAR_LAYERS, config.exclude)
        done["smoothed"] = smooth(model, _inputs(model, layers, samples, budget, folder), config.smooth)
    return done


def _inputs(model: ModelProto, layers: Sequence[Layer], samples: Samples, budget: Budget, folder: Path) -> dict[str, Inputs]:
    return input_statistics(model, layers, samples, folder, lambda share: budget.tick("int8-static", "inputs", 0.1 * share), budget.threads)


def _correct_biases(job: Job, model: ModelProto, kept: Sequence[str]) -> list[str]:
    layers = [layer for layer in weighted_layers(job.model) if layer.name in job.layers and layer.name not in kept]
    return correct_biases(job.model, model, layers, _inputs(job.model, layers, job.samples, job.budget, job.folder))


def planned(model: ModelProto, config: Int8StaticConfig, form: Form, samples: Samples, budget: Budget, folder: Path) -> Job:
    """Which nodes become int8. Raises NotApplicable where there is none."""
    types = CONVOLUTIONAL if any(node.op_type in {"Conv", "ConvTranspose"} for node in model.graph.node) else LINEAR
    excluded = frozenset({*config.exclude, *_unquantizable(model, types)})
    candidates = [node for node in model.graph.node if node.op_type in WEIGHTED & set(types) and node.name not in excluded]
    layers = tuple(node.name for node in candidates if _weight_of(node, model))
    if not layers:
        raise NotApplicable(f"there is no convolution, matrix product or table with constant float weights to quantize{elsewhere(model)}")
    return Job(model, config, form, samples, budget, folder, types, excluded, layers)


def _left_alone(job: Job) -> list[str]:
    """Layers that stay float by exclusion or by nature."""
    return sorted(job.excluded & {node.name for node in job.model.graph.node if node.op_type in WEIGHTED})


def _weight_of(node: NodeProto, model: ModelProto) -> TensorProto | None:
    """The constant float weight (or table) of a layer, or None for a product of two activations."""
    at = 0 if node.op_type == "Gather" else 1
    tensor = initializers(model.graph).get(node.input[at]) if len(node.input) > at else None
    return tensor if tensor is not None and tensor.data_type == TensorProto.FLOAT else None


def _unquantizable(model: ModelProto, types: Sequence[str]) -> set[str]:
    """Nodes that stay float whatever the config says: their int8 form is wrong, slower or does not load."""
    weights = initializers(model.graph)
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Gather" and not (node.input[0] in weights and weights[node.input[0]].data_type == TensorProto.FLOAT):
            found.add(node.name)
        if node.op_type == "Conv" and _weight_of(node, model) is None:
            found.add(node.name)
        if node.op_type == "Gemm" and len(node.input) > 2 and attributes(node).get("beta", 1.0) != 1.0:
            found.add(node.name)  # the quantizer forgets the factor of the bias
        if node.op_type in {"MatMul", "Gemm"} and _weight_of(node, model) is None and types == LINEAR:
            found.add(node.name)
        if node.op_type in {"Pad", "Resize", "Clip"} and any(
            n in weights and weights[n].data_type not in {TensorProto.FLOAT, TensorProto.INT64} for n in node.input[1:] if n
        ):
            found.add(node.name)
    return found


def activation_ranges(job: Job) -> dict[str, Range]:
    """Calibrated ranges of every float activation that the quantizer may ask for."""
    floats = {
        v.name
        for v in (*job.model.graph.value_info, *job.model.graph.input, *job.model.graph.output)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    weights = set(initializers(job.model.graph))
    wanted = dict.fromkeys(
        name
        for node in job.model.graph.node
        if node.op_type in job.types and node.name not in job.excluded
        for name in (*node.input, *node.output)
        if name in floats and name not in weights
    )
    how = Calibration(job.config.calibration, job.config.percentile, job.config.averaging)
    return calibrate(
        job.model, list(wanted), job.samples, how, job.folder, lambda step, share: job.tick(step, 0.1 + 0.6 * share), job.budget.threads
    )


def quantized(job: Job, ranges: dict[str, Range], keep: Sequence[str] = (), only: Sequence[str] = ()) -> ModelProto:
    """A quantized copy, but for the layers to `keep` in float; with `only`, just those nodes are."""
    copy = ModelProto()
    copy.CopyFrom(job.model)
    data = {name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32)) for name, (low, high) in ranges.items()}
    activation = _ACTIVATIONS[job.form.wide_activations, job.form.signed_activations]
    options: dict[str, Any] = {"ActivationSymmetric": job.config.symmetric, "MatMulConstBOnly": job.types == LINEAR}
    options["TensorQuantOverrides"] = {name: [{"quant_type": QuantType.QInt8}] for name in _tied_tables(job.model)}
    if job.types == LINEAR:
        options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    with quiet():
        quantizer = QDQQuantizer(
            copy, job.config.per_channel, job.form.reduce_range, QuantType.QInt8, activation, TensorsData(CalibrationMethod.MinMax, data),
            list(only), sorted({*job.excluded, *keep}), list(job.types), options,
        )  # fmt: skip
        quantizer.quantize_model()
    result: ModelProto = quantizer.model.model
    result.producer_name, result.producer_version = "hone", ""
    sort_nodes(result)
    return result


def _tied_tables(model: ModelProto) -> list[str]:
    """Tables that are also the weight of a layer, as of an embedding and its head: a Gather's rows have one scale, so that the layer's channels cannot have
    their own."""
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    weights = initializers(model.graph)
    return sorted({n.input[1] for n in model.graph.node if n.op_type in WEIGHTED - {"Gather"} and n.input[1] in tables & weights.keys()})


def float_left(model: ModelProto, before: Path, after: Path, asked: Collection[str]) -> list[str]:
    """Where the file did not shrink: the large float weights that stayed, largest first.

    Raises NotApplicable where the most of its weights did though nobody `asked` their nodes to.
    """
    if size_of(after) < size_of(before):
        return []
    sizes = {t.name: math.prod(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and math.prod(t.dims) > 256}
    small = sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type in {TensorProto.INT8, TensorProto.UINT8})
    named = [f"{t.name} {list(t.dims)}" for t in sorted(model.graph.initializer, key=lambda t: -math.prod(t.dims)) if t.name in sizes][:10]
    read = {name for node in model.graph.node if node.name not in asked for name in node.input}
    if sum(size for name, size in sizes.items() if name in read) > small:
        raise NotApplicable(f"the file would not shrink: the most of its weights stay float, the largest of them {named[0]}")
    return named


@contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime's tool warns through the root logger about what is done here on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def sensitivity(job: Job, ranges: dict[str, Range], trial: Trial) -> dict[str, float]:
    """Layer to the error of the outputs when it alone is quantized, worst first."""
    errors: dict[str, float] = {}
    for index, layer in enumerate(job.layers):
        job.tick("sensitivity", 0.7 + 0.2 * index / len(job.layers))
        errors[layer] = trial.error(quantized(job, ranges, only=[layer]))
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _look(model: ModelProto, job: Job, ranges: dict[str, Range], trial: Trial) -> float:
    """The outputs' relative error on a few rows; a hopeless one is no candidate, and the worst layer is named."""
    error = trial.error(model)
    if error > HOPELESS:
        worst, alone = next(iter(sensitivity(job, ranges, trial).items()))
        raise NotApplicable(f"in int8 {change(error)}; the worst layer is {worst!r} ({alone:.0%} alone): exclude it, or keep_float")
    return error
