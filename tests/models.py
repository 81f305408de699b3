"""Small ONNX models for tests, built on the spot: what they compute is easy to say, and their files are kilobytes.

Each builder writes `path` and returns it. `signature_of(path)` reads the signature as the deploy check would, without running anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.domain import Signature, TensorSpec

OPSET = 17
ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
DATATYPES = {int(element): name for name, element in ELEMENT_TYPES.items()}


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, Any] | None = None,
) -> Path:
    """One graph to one file."""
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="hone-tests")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def value(name: str, datatype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[datatype], list(shape))


def signature_of(path: Path, batchable: bool = True) -> Signature:
    """Inputs without initializers, and outputs; `batchable` as a deploy's proof would have said."""
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    return Signature(
        inputs=tuple(_spec(item) for item in graph.input if item.name not in weights),
        outputs=tuple(_spec(item) for item in graph.output),
        batchable=batchable,
    )


def _spec(item: onnx.ValueInfoProto) -> TensorSpec:
    kind = item.type.tensor_type
    dims = kind.shape.dim
    return TensorSpec(item.name, DATATYPES[int(kind.elem_type)], tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims))


def linear(path: Path, features: int = 4, outputs: int = 1) -> Path:
    """y = sum of four inputs a, b, c, d of [N, features] times 1, 2, 3, 4, summed over features into [N, outputs]: all overhead."""
    names = ["a", "b", "c", "d"]
    weights = {f"w_{n}": np.full((features, outputs), i + 1, np.float32) for i, n in enumerate(names)}
    nodes = [helper.make_node("MatMul", [n, f"w_{n}"], [f"m_{n}"]) for n in names]
    nodes += [
        helper.make_node("Add", ["m_a", "m_b"], ["ab"]),
        helper.make_node("Add", ["m_c", "m_d"], ["cd"]),
        helper.make_node("Add", ["ab", "cd"], ["y"]),
    ]
    inputs = [value(n, "FP32", ["N", features]) for n in names]
    return save(path, nodes, inputs, [value("y", "FP32", ["N", outputs])], weights)


def identity(path: Path, datatype: str = "FP32", shape: Sequence[int | str] = ("N", "M")) -> Path:
    """y = x, of any datatype and shape."""
    return save(path, [helper.make_node("Identity", ["x"], ["y"])], [value("x", datatype, shape)], [value("y", datatype, shape)])


def scaled(path: Path, factor: float = 2.0, width: int = 4) -> Path:
    """y = factor · x for x of [N, width]; two factors tell two versions apart."""
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    weights = {"factor": np.float32(factor)}
    return save(path, [node], [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])], weights)


def resnetish_cnn(path: Path, width: int = 16, blocks: int = 2, size: int = 32, classes: int = 10, seed: int = 0) -> Path:
    """A small residual network: x [N, 3, size, size] to logits [N, classes]."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    nodes: list[onnx.NodeProto] = []

    def conv(source: str, name: str, channels_in: int, channels_out: int) -> str:
        scale = (2.0 / (channels_in * 9)) ** 0.5
        weights[f"{name}_w"] = (rng.normal(size=(channels_out, channels_in, 3, 3)) * scale).astype(np.float32)
        weights[f"{name}_b"] = np.zeros(channels_out, np.float32)
        nodes.append(helper.make_node("Conv", [source, f"{name}_w", f"{name}_b"], [name], pads=[1] * 4, name=name))
        return name

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}_r"]))
        return f"{source}_r"

    stream = relu(conv("x", "stem", 3, width))
    for index in range(blocks):
        inner = conv(relu(conv(stream, f"c{index}a", width, width)), f"c{index}b", width, width)
        nodes.append(helper.make_node("Add", [stream, inner], [f"sum{index}"]))
        stream = relu(f"sum{index}")
    nodes.append(helper.make_node("GlobalAveragePool", [stream], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    weights["head_w"] = rng.normal(size=(width, classes)).astype(np.float32)
    weights["head_b"] = np.zeros(classes, np.float32)
    nodes.append(helper.make_node("Gemm", ["flat", "head_w", "head_b"], ["logits"]))
    return save(path, nodes, [value("x", "FP32", ["N", 3, size, size])], [value("logits", "FP32", ["N", classes])], weights)


def heavy(path: Path, width: int = 1024, layers: int = 4) -> Path:
    """y [N, width] = x through `layers` square products: about layers · width² · 2 operations a row."""
    rng = np.random.default_rng(1)
    weights = {f"w{i}": (rng.normal(size=(width, width)) / width**0.5).astype(np.float32) for i in range(layers)}
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i - 1}", f"w{i}"], ["y" if i == layers - 1 else f"h{i}"]) for i in range(layers)
    ]
    return save(path, nodes, [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])], weights)


def slow(path: Path, width: int = 4, inner: int = 1200, layers: int = 6) -> Path:
    """`scaled` by 3, after some milliseconds of products that change nothing: same inputs, outputs and names."""
    rng = np.random.default_rng(0)
    names = [f"w{layer}" for layer in range(layers)]
    weights = {
        "up": np.ones((width, inner), np.float32),
        **{name: rng.normal(0, 1e-3, (inner, inner)).astype(np.float32) for name in names},
    }
    weights |= {"down": np.zeros((inner, width), np.float32), "three": np.array(3.0, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "up"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{layer}", name], [f"h{layer + 1}"]) for layer, name in enumerate(names)]
    nodes += [
        helper.make_node("MatMul", [f"h{layers}", "down"], ["nothing"]), helper.make_node("Mul", ["x", "three"], ["tripled"]),
        helper.make_node("Add", ["tripled", "nothing"], ["y"]),
    ]  # fmt: skip
    return save(path, nodes, [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])], weights)


def scalars(path: Path) -> Path:
    """y [N] = x [N] · s [], z [] = sum of y: rank 0 in and out."""
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"]), helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)]
    return save(path, nodes, [value("x", "FP32", ["N"]), value("s", "FP32", [])], [value("y", "FP32", ["N"]), value("z", "FP32", [])])


def sum_of_scalars(path: Path, datatype: str = "FP32") -> Path:
    """c [] = a [] + b []: nothing but scalars (of BF16, which has no such kernel, in float32 between casts)."""
    node = helper.make_node("Add", ["a", "b"], ["c"])
    if datatype == "BF16":
        casts = [helper.make_node("Cast", [name], [name + "32"], to=TensorProto.FLOAT) for name in "ab"]
        back = helper.make_node("Cast", ["c32"], ["c"], to=TensorProto.BFLOAT16)
        return save(path, [*casts, helper.make_node("Add", ["a32", "b32"], ["c32"]), back], [value("a", datatype, []), value("b", datatype, [])], [value("c", datatype, [])])  # fmt: skip
    return save(path, [node], [value("a", datatype, []), value("b", datatype, [])], [value("c", datatype, [])])


def without_inputs(path: Path) -> Path:
    """y [3] = 0, 1, 2: a model that computes from its weights alone."""
    return save(
        path, [helper.make_node("Identity", ["w"], ["y"])], [], [value("y", "FP32", [3])], weights={"w": np.arange(3, dtype=np.float32)}
    )


def brain_half(path: Path) -> Path:
    """y = x · x in bfloat16 (computed in float32 between two casts)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "f"], ["g"]),
        helper.make_node("Cast", ["g"], ["y"], to=TensorProto.BFLOAT16),
    ]
    return save(path, nodes, [value("x", "BF16", ["N", "M"])], [value("y", "BF16", ["N", "M"])])


def failing(path: Path) -> Path:
    """y [N] = table[index]: raises where an index of the batch is out of 0 to 9, so one bad row fails its whole batch."""
    node = helper.make_node("Gather", ["table", "index"], ["y"])
    weights = {"table": np.arange(10, dtype=np.float32) * 10}
    return save(path, [node], [value("index", "INT64", ["N"])], [value("y", "FP32", ["N"])], weights)


KILLING_ROW = (-(2**63), -1)
"""x and d with which `killer` ends its process: the quotient does not fit, and the processor traps."""


def killer(path: Path, constant: bool = False) -> Path:
    """y [N] = x / d in int64. ONNX Runtime checks d = 0 but not KILLING_ROW: SIGFPE, the process is gone.

    With `constant` the killing row stands in the file, so that whatever runs or folds the graph dies.
    """
    node = helper.make_node("Div", ["x", "d"], ["y"])
    if constant:
        add = helper.make_node("Add", ["z", "y"], ["w"])
        weights = {"x": np.array([KILLING_ROW[0]], np.int64), "d": np.array([KILLING_ROW[1]], np.int64)}
        return save(path, [node, add], [value("z", "INT64", ["N"])], [value("w", "INT64", ["N"])], weights)
    return save(path, [node], [value("x", "INT64", ["N"]), value("d", "INT64", ["N"])], [value("y", "INT64", ["N"])])


def endless(path: Path, turns: int = 0) -> Path:
    """y [N] = x after n[0] turns of a loop, or `turns` if given: as long as you like, busy all the time."""
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "one"], ["v2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [value("turn", "INT64", []), value("go", "BOOL", []), value("v", "FP32", ["N"])],
        [value("go2", "BOOL", []), value("v2", "FP32", ["N"])],
    )
    loop = helper.make_node("Loop", ["turns", "yes", "x"], ["y"], body=body)
    weights: dict[str, Any] = {"yes": np.array(True), "one": np.float32(0.0)}
    if turns:
        return save(path, [loop], [value("x", "FP32", ["N"])], [value("y", "FP32", ["N"])], weights | {"turns": np.array(turns)})
    nodes = [helper.make_node("Squeeze", ["n"], ["turns"]), loop]
    return save(path, nodes, [value("x", "FP32", ["N"]), value("n", "INT64", [1])], [value("y", "FP32", ["N"])], weights)


def memory_eater(path: Path, bytes_wanted: int = 4 << 30) -> Path:
    """A file of some 200 bytes that takes `bytes_wanted` at its first run, not at load (case 53)."""
    ones = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["big"], value=ones),
        helper.make_node("ReduceSum", ["big"], ["s"], keepdims=0),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]
    return save(path, nodes, [value("x", "FP32", ["N"])], [value("y", "FP32", ["N"])], {"n": np.array([bytes_wanted // 4])})


def many_shapes(path: Path) -> Path:
    """Two convolutions over images of any size (case 51)."""
    rng = np.random.default_rng(2)
    weights = {
        "w": rng.normal(0, 0.1, size=(32, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(0, 0.1, size=(32, 32, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], pads=[1] * 4),
    ]
    return save(path, nodes, [value("x", "FP32", ["N", 3, "H", "W"])], [value("y", "FP32", ["N", 32, "H", "W"])], weights)


def dependent_rows(path: Path) -> Path:
    """y = x minus the mean over the batch (case 21): rows alone are not rows together."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])]
    return save(path, nodes, [value("x", "FP32", ["N", 4])], [value("y", "FP32", ["N", 4])])


def summing(path: Path) -> Path:
    """y [1] = sum over all rows of x [N]: an output that has no rows to split."""
    node = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)
    return save(path, [node], [value("x", "FP32", ["N"])], [value("y", "FP32", [1])])


def corrupt(path: Path) -> Path:
    """No ONNX at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"this is no model" * 20)
    return path
