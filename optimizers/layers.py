"""The layers of an ONNX graph that hold large constant float weights, and how much each weight's error matters to its layer's outputs.

For y = Wx the expected squared error of the outputs is Σ (w_ij − ŵ_ij)² E[x_j²] where inputs are uncorrelated: the second moment of an
input is the importance of the weights that multiply it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from optimizers.base import NotApplicable
from optimizers.calibration import Activations
from optimizers.onnx_file import graphs
from optimizers.onnx_graph import attributes, initializers
from optimizers.samples import Samples

KINDS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})
LINEAR: Final = frozenset({"Gemm", "MatMul"})
OTHER_FLOATS: Final = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64"}


@dataclass(frozen=True)
class Layer:
    """One node with its weight. A weight that several nodes share belongs to the first. `source`: the activation that it multiplies."""

    name: str
    kind: str
    tensor: str
    shape: tuple[int, ...]
    source: str
    groups: int = 1
    transposed: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def input_axis(self) -> int:
        """Axis of the activation along which its channels lie."""
        return 1 if self.kind in {"Conv", "ConvTranspose"} else -1

    @property
    def output_axis(self) -> int:
        """Axis of the weight along which the outputs lie (within a group, for ConvTranspose)."""
        if self.kind == "Conv" or (self.kind == "Gemm" and self.transposed):
            return 0
        return 1 if self.kind == "ConvTranspose" else len(self.shape) - 1

    def spread(self, per_input: NDArray[Any]) -> NDArray[Any]:
        """One number per input channel, as large as the weight; ones for a table."""
        if self.kind == "Gather":
            return np.ones(self.shape, np.float32)
        if self.kind == "Conv":
            grouped = np.repeat(per_input.reshape(self.groups, -1), self.shape[0] // self.groups, axis=0)
            return np.broadcast_to(grouped.reshape(*self.shape[:2], *[1] * (len(self.shape) - 2)), self.shape)
        axis = 0 if self.kind == "ConvTranspose" else len(self.shape) - 1 if self.transposed else len(self.shape) - 2
        shape = [1] * len(self.shape)
        shape[axis] = -1
        return np.broadcast_to(per_input.reshape(shape), self.shape)


def weighted_layers(model: ModelProto, kinds: Collection[str] = KINDS, exclude: Collection[str] = (), least: int = 1) -> list[Layer]:
    """Layers with a constant float weight of two axes or more and at least `least` elements."""
    weights = initializers(model.graph)
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        at = 0 if node.op_type == "Gather" else 1
        tensor = weights.get(node.input[at]) if node.op_type in kinds and len(node.input) > at else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or node.name in exclude:
            continue
        if int(np.prod(tensor.dims)) >= least and not attributes(node).get("transA", 0):
            found.setdefault(tensor.name, _layer(node, tensor))
    return list(found.values())


def elsewhere(model: ModelProto) -> str:
    """The end of a sentence that says that there are no float32 weights: where they are instead. '' where there are none at all."""
    main, *bodies = graphs(model.graph)
    inner = {tensor.data_type for body in bodies for tensor in body.initializer if len(tensor.dims) > 1}
    kinds = inner | {tensor.data_type for tensor in main.initializer if len(tensor.dims) > 1}
    if others := sorted(OTHER_FLOATS[kind] for kind in kinds & OTHER_FLOATS.keys()):
        return f": its weights are {' and '.join(others)}, so deploy the model with float32 weights for that"
    return ": its weights lie in the bodies of If, Loop or Scan, which are left as they are" if TensorProto.FLOAT in inner else ""


def _layer(node: NodeProto, tensor: TensorProto) -> Layer:
    given = attributes(node)
    source = node.input[1 if node.op_type == "Gather" else 0]
    return Layer(node.name, node.op_type, tensor.name, tuple(tensor.dims), source, given.get("group", 1), bool(given.get("transB", 0)))


@dataclass
class Inputs:
    """What a layer's input channels were over the samples: mean, second moment and largest magnitude of each."""

    mean: NDArray[np.float64]
    second: NDArray[np.float64]
    peak: NDArray[np.float64]
    count: int = 0

    @classmethod
    def none_yet(cls, channels: int) -> Inputs:
        return cls(np.zeros(channels), np.zeros(channels), np.zeros(channels))

    def extend(self, channels: NDArray[np.float64]) -> None:
        """`channels` [channels, values]."""
        self.count += channels.shape[1]
        share = channels.shape[1] / self.count
        self.mean += share * (channels.mean(axis=1) - self.mean)
        self.second += share * ((channels**2).mean(axis=1) - self.second)
        self.peak = np.maximum(self.peak, np.abs(channels).max(axis=1))


def input_statistics(
    model: ModelProto, layers: Sequence[Layer], samples: Samples, folder: Path, tick: Callable[[float], None], threads: int = 1
) -> dict[str, Inputs]:
    """By layer; tables have none. Raises NotApplicable where activations are not finite."""
    axes = {layer.source: layer.input_axis for layer in layers if layer.kind != "Gather"}
    kept: dict[str, Inputs] = {}
    for share, name, rows in Activations(model, list(axes), samples, folder, threads):
        tick(share)
        whole = rows if samples.stacked else rows[0]  # what is fed whole comes as one row
        channels = np.moveaxis(whole.astype(np.float64), axes[name], 0)
        if not np.isfinite(channels).all():
            raise NotApplicable(f"the activations of {name!r} are not finite on the calibration samples")
        flat = channels.reshape(len(channels), -1)
        kept.setdefault(name, Inputs.none_yet(len(flat))).extend(flat)
    return {layer.name: kept[layer.source] for layer in layers if layer.source in kept}
