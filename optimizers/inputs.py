"""Inputs made up for a model that nobody gave samples of: right in datatype and shape, small where they may be ids, seeded.

Sizes of dynamic axes are found by trying what the model accepts, with hints from its first layers. It judges nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto

from optimizers.samples import Samples
from optimizers.session import DATATYPES, Feeds, TensorInfo

NUMPY: Final[dict[str, str]] = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "FP16": "float16", "BF16": "float32", "FP32": "float32", "FP64": "float64", "BYTES": "object",
}  # fmt: skip
"""The dtype in which a tensor is made; bfloat16, which numpy lacks, is made as float32 (optimizers.session takes it so)."""
SIZES_TRIED: Final = (16, 32, 64, 224, 8, 7, 128, 1, 2, 3, 4, 512)
CHANNELS_TRIED: Final = (3, 1)
ROWS_TRIED: Final = 5
MOST_ELEMENTS: Final = 1 << 22
INTEGERS_TRIED: Final = ((0, 8), (0, 2), (1, 2))
WORDS: Final = ("a", "good", "bad", "red", "blue", "one", "two", "zero")
AxisSizes = dict[tuple[str, int], int]


@dataclass(frozen=True)
class InputMaker:
    """Makes rows for `inputs`. `sizes` holds the chosen size of each dynamic axis but the first; `integers` is [low, high).

    Where `samples` exist they are the first rows, and what is made up comes after them.
    """

    inputs: tuple[TensorInfo, ...]
    sizes: AxisSizes = field(default_factory=dict)
    integers: tuple[int, int] = (0, 8)
    seed: int = 0
    samples: Samples | None = None

    @property
    def elements(self) -> int:
        """How many a row has, all inputs together."""
        return sum(math.prod(self._size(info, axis, size, 1) for axis, size in enumerate(info.shape)) for info in self.inputs)

    def rows(self, count: int) -> Feeds:
        """`count` different rows; an input whose first axis is fixed keeps it."""
        rng = np.random.default_rng(self.seed)
        feeds = {info.name: self._values(info, count, rng) for info in self.inputs}
        if self.samples is not None and self.samples.stacked:
            taken = min(count, len(self.samples))
            for name, values in self.samples.inputs.items():
                feeds[name] = np.concatenate([values[:taken], feeds[name][taken:].astype(values.dtype)])
        return feeds

    def _values(self, info: TensorInfo, rows: int, rng: np.random.Generator) -> NDArray[Any]:
        shape = tuple(self._size(info, axis, size, rows) for axis, size in enumerate(info.shape))
        datatype = DATATYPES[info.type]
        dtype = np.dtype(NUMPY[datatype])
        if datatype == "BYTES":
            return rng.choice(np.array(WORDS, object), shape)
        if dtype.kind == "f":
            return rng.standard_normal(shape).astype(dtype)
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(dtype)
        if datatype in {"UINT8", "INT8"} and self.integers == INTEGERS_TRIED[0]:
            limits = np.iinfo(dtype)
            return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
        if "mask" in info.name.lower():
            mask = rng.integers(0, 2, shape)
            mask[..., :1] = 1  # a row that sees nothing is no real input
            return mask.astype(dtype)
        return rng.integers(*self.integers, shape).astype(dtype)

    def _size(self, info: TensorInfo, axis: int, size: int | str | None, rows: int) -> int:
        if isinstance(size, int):
            return size
        return rows if axis == 0 else self.sizes[(info.name, axis)]


def find_maker(
    inputs: tuple[TensorInfo, ...], graph: GraphProto, accepts: Callable[[Feeds], None], seed: int = 0, samples: Samples | None = None
) -> InputMaker:
    """The first maker whose rows, one by one, the model takes; `accepts` runs one and raises a RuntimeError of its own where it does not.

    Raises that of the first attempt when none is taken.
    """
    first: RuntimeError | None = None
    makers = _makers(inputs, graph, seed, samples)
    for maker in sorted(
        makers, key=lambda maker: maker.elements > MOST_ELEMENTS
    ):  # with many free axes sizes multiply: those are tried last
        try:
            for row in _tried(maker):
                accepts(row)
        except RuntimeError as error:
            first = first or error
        else:
            return maker
    assert first is not None
    raise first


def _makers(inputs: tuple[TensorInfo, ...], graph: GraphProto, seed: int, samples: Samples | None) -> Iterator[InputMaker]:
    hints = axis_hints(graph)
    if samples is not None and samples.stacked:
        hints |= {(name, axis): size for name, values in samples.inputs.items() for axis, size in enumerate(values.shape)}
    free = [(info, axis) for info in inputs for axis, size in enumerate(info.shape) if axis and not isinstance(size, int)]
    channels = [(info.name, axis) for info, axis in free if axis == 1 and len(info.shape) >= 4 and (info.name, 1) not in hints]
    unknown = [(info.name, axis) for info, axis in free if (info.name, axis) not in hints and (info.name, axis) not in channels]
    integer = any(DATATYPES[info.type].startswith(("INT", "UINT")) for info in inputs)
    known = {(info.name, axis): hints[(info.name, axis)] for info, axis in free if (info.name, axis) in hints}
    for size, channel, integers in itertools.product(
        SIZES_TRIED if unknown else (0,), CHANNELS_TRIED if channels else (0,), INTEGERS_TRIED if integer else INTEGERS_TRIED[:1]
    ):
        sizes = {**dict.fromkeys(unknown, size), **dict.fromkeys(channels, channel), **known}
        yield InputMaker(inputs, sizes, integers, seed, samples)


def _tried(maker: InputMaker) -> Iterator[Feeds]:
    """One row; several where inputs are integers, for a model may take some of these and not others (ids out of range, division by zero)."""
    by_value = any(DATATYPES[info.type].startswith(("INT", "UINT")) for info in maker.inputs)
    free = all(info.shape and not isinstance(info.shape[0], int) for info in maker.inputs)
    yield maker.rows(1)
    if by_value and free:
        rows = maker.rows(ROWS_TRIED)
        yield from (take(rows, [index]) for index in range(ROWS_TRIED))


def axis_hints(graph: GraphProto) -> AxisSizes:
    """Sizes that the weights of the first layers dictate: a convolution's channels, a linear layer's features."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.input}
    hints: AxisSizes = {}
    for node in graph.node:
        name = node.input[0] if node.input else ""
        weight = weights.get(node.input[1], ()) if len(node.input) > 1 else ()
        if name not in ranks or len(weight) < 2:
            continue
        if node.op_type == "Conv":
            hints[(name, 1)] = weight[1] * _integer(node, "group", 1)
        elif node.op_type == "Gemm" and not _integer(node, "transA", 0):
            hints[(name, 1)] = weight[1] if _integer(node, "transB", 0) else weight[0]
        elif node.op_type == "MatMul":
            hints[(name, ranks[name] - 1)] = weight[-2]
    return hints


def _integer(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def take(feeds: Feeds, index: Sequence[int]) -> Feeds:
    """The rows `index` of each input, in that order."""
    return {name: values[list(index)] for name, values in feeds.items()}


def scaled(feeds: Feeds, factor: float) -> Feeds:
    """Floating-point inputs times `factor`; others as they are."""
    return {name: (values * values.dtype.type(factor) if values.dtype.kind == "f" else values) for name, values in feeds.items()}
