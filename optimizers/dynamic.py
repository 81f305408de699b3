"""Dynamic int8: weights of linear layers in 8 bits, activations quantized with the range of each call.

The range is one for the whole call, so a row's answer hangs on its batch-mates (onnxruntime#10111): requests for such a model are not joined.
"""

from __future__ import annotations

import math
import time
from typing import Final

from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode, save_and_reload_model_with_shape_infer

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.census import layer_costs, quantization_of
from optimizers.int8 import Form, Int8DynamicConfig
from optimizers.layers import elsewhere
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import attributes, initializers, load, save, sort_nodes
from optimizers.prepare import prepared
from optimizers.qdq import float_left, quiet
from optimizers.samples import Samples

OPERATORS: Final = ("MatMul", "Gemm", "Gather", "LSTM", "Attention", "EmbedLayerNormalization")
CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
MOSTLY: Final = 0.5
"""Share of the work (or, where shapes are unknown, of the weights) in convolutions from which on the method does not apply."""
ROWS: Final = "dependent: activations are scaled over the whole batch, so requests are not joined"


def build(artifact: Artifact, config: Int8DynamicConfig, form: Form, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with dynamic int8. Raises NotApplicable: already quantized, mostly convolutions, or nothing linear in it."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): int8-dynamic needs a float model")
    share = convolutional_share(source, samples.row_shapes())
    if share > MOSTLY and not elsewhere(source):
        raise NotApplicable(
            f"{share:.0%} of its work is in convolutions, which int8-dynamic leaves alone; int8-static is the method for them"
        )
    ready = prepared(source, folder)
    layers = _linear_layers(ready.model, set(config.exclude))
    if not layers:
        raise NotApplicable(
            f"no layer multiplies by constant float weights (MatMul, Gemm, LSTM, Gather), so there is nothing to quantize{elsewhere(source)}"
        )
    budget.tick(config.method, "quantizing", 0.5)
    model = save_and_reload_model_with_shape_infer(ready.model)
    with quiet():
        quantizer = ONNXQuantizer(
            model, config.per_channel, form.reduce_range, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None,
            [], list(config.exclude), list(OPERATORS), {"MatMulConstBOnly": True},
        )  # fmt: skip
        quantizer.quantize_model()
    built: ModelProto = quantizer.model.model
    built.producer_name, built.producer_version = "hone", ""
    sort_nodes(built)
    path = save(built, folder / "model.onnx")
    before, after = size_of(artifact.path), size_of(path)
    facts = {
        "method": config.method, "target": form.target, "proven_here": form.here, "reduce_range": form.reduce_range, "per_channel": config.per_channel,
        "quantized_layers": len(layers), "kept_float": sorted(config.exclude), "convolutional_share": share, "prepared": ready.facts, "rows": ROWS,
        "bytes_before": before, "bytes": after, "float_left": float_left(built, artifact.path, path, config.exclude), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def convolutional_share(model: ModelProto, row: dict[str, tuple[int, ...]]) -> float:
    """Share of multiply-adds in convolutions; of weights, where shapes are unknown; 0 where there are neither."""
    costs = layer_costs(model, row)
    if any(cost is None for _, cost in costs):
        weights = initializers(model.graph)
        costs = [(node, sum(math.prod(weights[n].dims) for n in node.input if n in weights)) for node, _ in costs]
    total = sum(cost or 0 for _, cost in costs)
    return sum(cost or 0 for node, cost in costs if node.op_type in CONVOLUTIONS) / total if total else 0.0


def _linear_layers(model: ModelProto, excluded: set[str]) -> list[str]:
    """Names of the nodes that will be quantized."""
    floats = {name for name, tensor in initializers(model.graph).items() if tensor.data_type == TensorProto.FLOAT}
    found = []
    for node in model.graph.node:
        weight = node.input[0] if node.op_type == "Gather" else node.input[1] if len(node.input) > 1 else ""
        plain = node.op_type != "Gemm" or (attributes(node).get("alpha", 1.0) == attributes(node).get("beta", 1.0) == 1.0)
        if node.op_type in OPERATORS and weight in floats and plain and node.name not in excluded:
            found.append(node.name)
    return found
