"""What one layer of a graph takes on this host, in float32 and in int8: each as a model of its own, run in turns. CPU seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from optimizers.base import NotApplicable
from optimizers.census import infer_shapes
from optimizers.layers import Layer
from optimizers.onnx_graph import attributes, constants, save, set_constant
from optimizers.session import Settings, open_session

TIMED_S: Final = 0.15
ROUNDS: Final = 5
LEAST_S: Final = 1e-7
OPSET: Final = 17
_SCALE: Final = 0.05
"""Of everything: the values do not matter to the time."""

Timed = tuple[Any, Mapping[str, Any]]
"""A session and what it is fed."""


def in_turns(plain: Timed, other: Timed) -> tuple[float, float]:
    """CPU seconds of a call of `plain`, and the time of `other` over it: medians of rounds in turns."""
    rounds = [tuple(timed(session, feeds, TIMED_S / ROUNDS) for session, feeds in (plain, other)) for _ in range(ROUNDS)]
    return float(np.median([one for one, _ in rounds])), float(np.median([two / one for one, two in rounds]))


def timed(session: Any, feeds: Mapping[str, Any], seconds: float) -> float:
    """CPU seconds of one call."""
    session.run(None, feeds)
    started, calls = time.process_time(), 0
    while time.process_time() - started < seconds:
        session.run(None, feeds)
        calls += 1
    return (time.process_time() - started) / max(calls, 1)


def seconds_of(
    model: ModelProto, layers: Sequence[Layer], row: Mapping[str, Sequence[int]] | None, signed: bool, folder: Path, threads: int
) -> dict[str, tuple[float, float]]:
    """By layer: (float32, int8) of one row, without its bias and what a call takes by itself; tables (Gather) take none. Layers alike in shape are timed once.

    In int8 its inputs and outputs are integers already, `signed` or not, as between layers that are all int8.
    Raises NotApplicable where the size of a layer's input is not known.
    """
    shapes, weights = infer_shapes(model, {name: tuple(sizes) for name, sizes in row.items()} if row else None), constants(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    found: dict[str, tuple[float, float]] = {}
    known: dict[Any, tuple[float, float]] = {}
    call_s = _call(folder, threads)
    for layer in layers:
        if layer.kind == "Gather":
            found[layer.name] = (0.0, 0.0)
            continue
        image = tuple(shapes.get(layer.source, ()))
        if not image or not all(isinstance(size, int) and size > 0 for size in image):
            raise NotApplicable(f"the size of what {layer.name} takes is not known: count=time needs it (count=operations does not)")
        alike = (layer.kind, layer.shape, image, tuple(sorted((k, str(v)) for k, v in attributes(nodes[layer.name]).items())))
        if alike not in known:
            both = _both(nodes[layer.name], layer, weights[layer.tensor], image, signed, folder, threads)
            known[alike] = max(LEAST_S, both[0] - call_s), max(LEAST_S, both[1] - call_s)
        found[layer.name] = known[alike]
    return found


def _call(folder: Path, threads: int) -> float:
    """What a call takes by itself."""
    one = _alone([helper.make_node("Relu", ["x"], ["y"])], {}, (1,), TensorProto.FLOAT)
    return timed(
        open_session(save(one, folder / "layer.onnx"), Settings(intra_op_threads=threads)), {"x": np.zeros(1, np.float32)}, TIMED_S
    )


def _both(
    node: NodeProto, layer: Layer, weight: Any, image: tuple[int, ...], signed: bool, folder: Path, threads: int
) -> tuple[float, float]:
    random = np.random.default_rng(0)
    kind = np.int8 if signed else np.uint8
    settings = Settings(intra_op_threads=threads)
    plain = (
        open_session(save(_float(node, weight, image), folder / "layer.onnx"), settings),
        {"x": random.standard_normal(image, np.float32)},
    )
    low, high = (-100, 100) if signed else (28, 228)
    other = (
        open_session(save(_int8(node, layer, weight, image, kind), folder / "layer.onnx"), settings),
        {"x": random.integers(low, high, image, kind)},
    )
    seconds, ratio = in_turns(plain, other)
    return seconds, seconds * ratio


def _float(node: NodeProto, weight: Any, image: tuple[int, ...]) -> ModelProto:
    return _alone([_copy(node, ["x", "w"], "y")], {"w": weight}, image, TensorProto.FLOAT)


def _int8(node: NodeProto, layer: Layer, weight: Any, image: tuple[int, ...], kind: Any) -> ModelProto:
    axis = layer.output_axis
    largest = np.abs(weight).max(axis=tuple(at for at in range(weight.ndim) if at != axis), keepdims=True) + 1e-12
    scale = (largest / 127).astype(np.float32)
    made = helper.make_node
    nodes = [
        made("DequantizeLinear", ["x", "s", "z"], ["x_float"]),
        made("DequantizeLinear", ["w", "ws", "wz"], ["w_float"], axis=axis),
        _copy(node, ["x_float", "w_float"], "y_float"),
        made("QuantizeLinear", ["y_float", "ys", "z"], ["y"]),
    ]
    values = {
        "s": np.array(_SCALE, np.float32), "z": np.array(0 if kind is np.int8 else 128, kind), "w": np.round(weight / scale).astype(np.int8),
        "ws": scale.ravel(), "wz": np.zeros(scale.size, np.int8), "ys": np.array(_SCALE * math.sqrt(weight.size), np.float32),
    }  # fmt: skip
    return _alone(nodes, values, image, TensorProto.INT8 if kind is np.int8 else TensorProto.UINT8)


def _copy(node: NodeProto, inputs: list[str], output: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    del copy.output[:]
    copy.input.extend(inputs)
    copy.output.append(output)
    return copy


def _alone(nodes: list[NodeProto], values: Mapping[str, Any], image: tuple[int, ...], kind: int) -> ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "layer", [value("x", kind, image)], [value("y", kind, None)])
    for name, weight in values.items():
        set_constant(graph, name, np.ascontiguousarray(weight) if np.ndim(weight) else weight)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
