"""Weights coded one input after another, each one's error made up for by the inputs still to come: least error of the layer's outputs.

For y = Wx the error is Σ over outputs of δᵀGδ with G = E[xxᵀ]; the update is that of optimal brain surgery (Hassibi and Stork 1993) as GPTQ
orders it (Frantar et al. 2022, arXiv:2210.17323), for any levels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from optimizers.calibration import Activations
from optimizers.layers import LINEAR, Layer
from optimizers.onnx_graph import attributes
from optimizers.samples import Samples

WIDEST: Final = 5000
"""Inputs of an output beyond which G takes too much memory and time."""
ROWS_AT_ONCE: Final = 4096
DAMPING: Final = 0.01
"""Share of the mean of G's diagonal added to it."""
BLOCK: Final = 128
Array = NDArray[Any]
Code = Callable[[Array], Array]


def suits(model: ModelProto, layer: Layer) -> bool:
    """Whether its inputs can be written as rows: plain convolutions with stated borders, and products with a matrix."""
    if layer.kind in LINEAR:
        return len(layer.shape) == 2 and layer.shape[1 - layer.output_axis] <= WIDEST
    given = attributes(_node(model, layer))
    plain = given.get("auto_pad", b"NOTSET") in {b"NOTSET", b"VALID"} and set(given.get("dilations", [1])) == {1}
    return bool(layer.kind == "Conv" and layer.groups == 1 and len(layer.shape) == 4 and plain and int(np.prod(layer.shape[1:])) <= WIDEST)


def gram(model: ModelProto, layer: Layer, samples: Samples, folder: Path, threads: int) -> NDArray[np.float64]:
    """E[xxᵀ] over the samples; for a convolution x is the patch that one place of the output sees."""
    total, count = np.zeros(()), 0
    for _, _, activation in Activations(model, [layer.source], samples, folder, threads):
        rows = _rows(activation if samples.stacked else activation[0], layer, model)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            piece = rows[start : start + ROWS_AT_ONCE]
            total = total + (piece.T @ piece).astype(np.float64)
        count += len(rows)
    return np.asarray(total / max(count, 1))


def assign(matrix: Array, moments: NDArray[np.float64], code: Code, decode: Code, zero: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Codes of `matrix` [outputs, inputs]; where `zero` the value is 0 and the code is not used."""
    damped = moments + np.eye(len(moments)) * (DAMPING * np.trace(moments) / len(moments) + 1e-12)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = matrix.astype(np.float64), np.zeros(matrix.shape, np.int64)
    for start in range(0, len(moments), BLOCK):
        stop = min(start + BLOCK, len(moments))
        errors = np.zeros((len(matrix), stop - start))
        for at in range(start, stop):
            codes[:, at] = code(left[:, at])
            seen = np.where(zero[:, at], 0.0, decode(codes[:, at]))
            errors[:, at - start] = (left[:, at] - seen) / factor[at, at]
            left[:, at + 1 : stop] -= errors[:, at - start, None] * factor[at, at + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def as_matrix(layer: Layer, values: Array) -> Array:
    """A weight as [outputs, inputs], in the order of the rows' columns."""
    return values.reshape(values.shape[0], -1) if layer.output_axis == 0 else values.T


def from_matrix(layer: Layer, matrix: Array) -> Array:
    return matrix.reshape(layer.shape) if layer.output_axis == 0 else matrix.T


def _rows(activation: Array, layer: Layer, model: ModelProto) -> NDArray[np.float32]:
    if layer.kind in LINEAR:
        return np.asarray(activation, np.float32).reshape(-1, activation.shape[-1])
    given = attributes(_node(model, layer))
    top, left, bottom, right = given.get("pads", [0] * 4)
    down, across = given.get("strides", [1, 1])
    padded = np.pad(activation, ((0, 0), (0, 0), (top, bottom), (left, right)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, layer.shape[2:], axis=(2, 3))[:, :, ::down, ::across]
    return np.ascontiguousarray(patches.transpose(0, 2, 3, 1, 4, 5), np.float32).reshape(-1, int(np.prod(layer.shape[1:])))


def _node(model: ModelProto, layer: Layer) -> NodeProto:
    nodes: dict[str, NodeProto] = {node.name: node for node in model.graph.node}
    return nodes[layer.name]
