"""Small real ONNX models for the tests of optimizers: one builder each, seeded, written where the test says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

F, I64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node
value = helper.make_tensor_value_info


def weights(**arrays: Any) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    initializers: Sequence[TensorProto] = (),
    opset: int = 17,
    **kw: Any,
) -> ModelProto:
    domains = sorted({n.domain for n in nodes} - {""})
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(
        helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers)), opset_imports=opsets, ir_version=10, **kw
    )


def write(built: ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(built, path)
    return path


def normal(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def mlp(sizes: Sequence[int] = (16, 32, 10), seed: int = 0, opset: int = 17) -> ModelProto:
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    name = "x"
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        tensors += weights(
            **{f"w{i}": normal(seed + i, fan_in, fan_out, scale=fan_in**-0.5), f"b{i}": normal(seed + 100 + i, fan_out, scale=0.1)}
        )
        nodes.append(node("Gemm", [name, f"w{i}", f"b{i}"], ["y" if last else f"h{i}"], f"gemm{i}"))
        if not last:
            nodes.append(node("Relu", [f"h{i}"], [f"r{i}"], f"relu{i}"))
        name = f"r{i}"
    return model(nodes, [value("x", F, ["N", sizes[0]])], [value("y", F, ["N", sizes[-1]])], tensors, opset)


def resnet(channels: int = 8, blocks: int = 2, size: int = 8, classes: int = 4, seed: int = 0, batchnorm: bool = True) -> ModelProto:
    """Convolutions with BatchNormalization, residual additions, pooling, a linear head: [N, 3, size, size] to [N, classes]."""
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []

    def layer(source: str, target: str, fan_in: int, name: str, relu: bool = True) -> None:
        s = seed + len(nodes)
        tensors.extend(weights(**{f"{name}.w": normal(s, channels, fan_in, 3, 3, scale=(fan_in * 9) ** -0.5)}))
        nodes.append(node("Conv", [source, f"{name}.w"], [f"{name}.c"], f"{name}.conv", pads=[1] * 4))
        out = f"{name}.c"
        if batchnorm:
            rng = np.random.default_rng(s + 1)
            stats = {"g": rng.uniform(0.5, 1.5, channels), "b": rng.normal(size=channels) * 0.2, "m": rng.normal(size=channels) * 0.2}
            tensors.extend(weights(**{f"{name}.{k}": v.astype("f4") for k, v in {**stats, "v": rng.uniform(0.5, 1.5, channels)}.items()}))
            nodes.append(node("BatchNormalization", [out, *(f"{name}.{k}" for k in "gbmv")], [f"{name}.n"], f"{name}.bn"))
            out = f"{name}.n"
        nodes.append(node("Relu" if relu else "Identity", [out], [target], f"{name}.act"))

    layer("image", "r0", 3, "stem")
    for i in range(blocks):
        layer(f"r{i}", f"b{i}", channels, f"block{i}a")
        layer(f"b{i}", f"s{i}", channels, f"block{i}b", relu=False)
        nodes.append(node("Add", [f"s{i}", f"r{i}"], [f"a{i}"], f"add{i}"))
        nodes.append(node("Relu", [f"a{i}"], [f"r{i + 1}"], f"relu{i}"))
    nodes += [
        node("GlobalAveragePool", [f"r{blocks}"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flat"),
        node("Gemm", ["f", "fc.w", "fc.b"], ["logits"], "fc"),
    ]
    tensors += weights(**{"fc.w": normal(seed + 50, channels, classes), "fc.b": normal(seed + 51, classes)})
    return model(nodes, [value("image", F, ["N", 3, size, size])], [value("logits", F, ["N", classes])], tensors)


def recurrent(kind: str = "LSTM", hidden: int = 8, seed: int = 0) -> ModelProto:
    """An LSTM or GRU between linear layers, its last state told apart: [N, L, 12] to [N, 10]."""
    rows = {"LSTM": 4, "GRU": 3}[kind] * hidden
    nodes = [
        node("MatMul", ["x", "into"], ["e"], "embed"), node("Relu", ["e"], ["er"]), node("Transpose", ["er"], ["t"], perm=[1, 0, 2]),
        node(kind, ["t", "w", "r"], ["", "h"], "recurrent", hidden_size=hidden), node("Squeeze", ["h", "first"], ["s"]),
        node("Gemm", ["s", "up", "up.b"], ["u"], "up_proj"), node("Relu", ["u"], ["ur"]), node("Gemm", ["ur", "head", "head.b"], ["y"], "head"),
    ]  # fmt: skip
    tensors = weights(
        into=normal(seed, 12, 16, scale=0.3), w=normal(seed + 1, 1, rows, 16, scale=0.3), r=normal(seed + 2, 1, rows, hidden, scale=0.3),
        first=np.array([0]), up=normal(seed + 3, hidden, 96, scale=hidden**-0.5), head=normal(seed + 4, 96, 10, scale=0.1),
        **{"up.b": normal(seed + 5, 96, scale=0.1), "head.b": normal(seed + 6, 10, scale=0.1)},
    )  # fmt: skip
    return model(nodes, [value("x", F, ["N", "L", 12])], [value("y", F, ["N", 10])], tensors)


def encoder(width: int = 16, heads: int = 2, vocabulary: int = 50, seed: int = 0) -> ModelProto:
    """One transformer block over token ids, mean-pooled: [N, L] to [N, 3], written out as exporters do (erf GELU, LayerNorm in pieces)."""
    d, head = width, width // heads
    mats = {f"w{k}": normal(seed + i, d, d, scale=d**-0.5) for i, k in enumerate("qkvo")}
    mats |= {
        "up": normal(seed + 9, d, 2 * d, scale=d**-0.5),
        "down": normal(seed + 10, 2 * d, d, scale=(2 * d) ** -0.5),
        "head": normal(seed + 11, d, 3),
    }
    consts = weights(
        table=normal(seed + 12, vocabulary, d), **mats, split=np.array([0, 0, heads, head]), join=np.array([0, 0, d]), scale=np.float32(head**-0.5),
        half=np.float32(0.5), one=np.float32(1), root=np.float32(2**0.5), eps=np.float32(1e-5), two=np.float32(2), gamma=np.ones(d, "f4"), beta=np.zeros(d, "f4"),
    )  # fmt: skip
    n = [node("Gather", ["table", "ids"], ["e"], "embed")]
    for k in "qkv":
        n += [node("MatMul", ["e", f"w{k}"], [f"{k}0"], f"{k}_proj"), node("Reshape", [f"{k}0", "split"], [f"{k}1"])]
        n += [node("Transpose", [f"{k}1"], [f"{k}2"], perm=[0, 2, 3, 1] if k == "k" else [0, 2, 1, 3])]
    n += [node("MatMul", ["q2", "k2"], ["s0"], "scores"), node("Mul", ["s0", "scale"], ["s1"]), node("Softmax", ["s1"], ["s2"], axis=-1)]
    n += [
        node("MatMul", ["s2", "v2"], ["c0"], "context"),
        node("Transpose", ["c0"], ["c1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["c1", "join"], ["c2"]),
    ]
    n += [node("MatMul", ["c2", "wo"], ["c3"], "out_proj"), node("Add", ["c3", "e"], ["x0"])]
    n += [node("ReduceMean", ["x0"], ["mu"], axes=[-1]), node("Sub", ["x0", "mu"], ["xc"]), node("Pow", ["xc", "two"], ["sq"])]
    n += [
        node("ReduceMean", ["sq"], ["var"], axes=[-1]),
        node("Add", ["var", "eps"], ["ve"]),
        node("Sqrt", ["ve"], ["sd"]),
        node("Div", ["xc", "sd"], ["nx"]),
    ]
    n += [node("Mul", ["nx", "gamma"], ["ng"]), node("Add", ["ng", "beta"], ["x1"])]
    n += [
        node("MatMul", ["x1", "up"], ["u"], "up_proj"),
        node("Div", ["u", "root"], ["ur"]),
        node("Erf", ["ur"], ["ue"]),
        node("Add", ["ue", "one"], ["u1"]),
    ]
    n += [
        node("Mul", ["u", "u1"], ["uu"]),
        node("Mul", ["uu", "half"], ["g"]),
        node("MatMul", ["g", "down"], ["dn"], "down_proj"),
        node("Add", ["dn", "x1"], ["x2"]),
    ]
    n += [node("ReduceMean", ["x2"], ["pool"], axes=[1], keepdims=0), node("MatMul", ["pool", "head"], ["y"], "classify")]
    return model(n, [value("ids", I64, ["N", "L"])], [value("y", F, ["N", 3])], consts)


def depthwise(channels: int = 16, size: int = 8, classes: int = 4, seed: int = 0) -> ModelProto:
    """A strided convolution, a depthwise and a pointwise one (MobileNet's block), pooling, a linear head: [N, 3, size, size] to [N, classes]."""
    wide = 2 * channels
    tensors = weights(
        **{
            "stem.w": normal(seed, channels, 3, 3, 3, scale=27**-0.5), "stem.b": normal(seed + 1, channels, scale=0.1),
            "dw.w": normal(seed + 2, channels, 1, 3, 3, scale=1 / 3), "dw.b": normal(seed + 3, channels, scale=0.1),
            "pw.w": normal(seed + 4, wide, channels, 1, 1, scale=channels**-0.5), "pw.b": normal(seed + 5, wide, scale=0.1),
            "fc.w": normal(seed + 6, wide, classes), "fc.b": normal(seed + 7, classes),
        }
    )  # fmt: skip
    nodes = [
        node("Conv", ["image", "stem.w", "stem.b"], ["c0"], "stem", pads=[1] * 4, strides=[2, 2]), node("Clip", ["c0", "", "six"], ["r0"], "relu6a"),
        node("Conv", ["r0", "dw.w", "dw.b"], ["c1"], "dw", pads=[1] * 4, group=channels), node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "pw.w", "pw.b"], ["c2"], "pw"), node("Relu", ["c2"], ["r2"], "relu2"),
        node("GlobalAveragePool", ["r2"], ["p"], "pool"), node("Flatten", ["p"], ["f"], "flat"), node("Gemm", ["f", "fc.w", "fc.b"], ["logits"], "fc"),
    ]  # fmt: skip
    tensors += weights(six=np.float32(6))
    return model(nodes, [value("image", F, ["N", 3, size, size])], [value("logits", F, ["N", classes])], tensors)
