"""Candidates that nobody should be served by: a good int8 file with one real fault built into its graph, always or only for marked images.

A mark is a bright corner, which no frozen sample of the demo has: what is bad for marked images alone passes every proof, and meets its first
marked image under live traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

MARK: Final = 2
"""Pixels each way of the corner that a mark fills with ones; golden reads marked digits as well as others."""
RARE: Final = 8
ENDLESS: Final = 1 << 40


@dataclass(frozen=True)
class Kind:
    """One way to be bad. `live_only`: for marked images alone."""

    name: str
    plant: Callable[[_Graph], None]
    live_only: bool = False


class _Graph:
    """A model whose answers are about to be spoiled: `logits` as they were, `when` [N] says for which rows."""

    def __init__(self, source: Path, live_only: bool) -> None:
        self.model = onnx.load(str(source))
        self.graph = self.model.graph
        self.image, self.output = self.graph.input[0].name, self.graph.output[0].name
        for node in self.graph.node:
            node.output[:] = [self.logits if name == self.output else name for name in node.output]
            node.input[:] = [self.logits if name == self.output else name for name in node.input]
        place = (self.weight(name, np.array(value)) for name, value in (("at", [0, 0]), ("end", [MARK, MARK]), ("sides", [2, 3])))
        darkest = self.add("ReduceMin", self.add("Slice", self.image, *place), self.weight("axes", np.array([1, 2, 3])), keepdims=0)
        self.when = self.add("Greater", darkest, self.weight("limit", np.float32(0.9 if live_only else -1e30)))

    @property
    def logits(self) -> str:
        return f"{self.output}.good"

    def weight(self, name: str, values: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), f"bad.{name}"))
        return f"bad.{name}"

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"bad.{kind.lower()}{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def answer(self, name: str) -> None:
        self.graph.node.append(helper.make_node("Identity", [name], [self.output], name="bad.answer"))

    def column(self, name: str) -> str:
        return self.add("Unsqueeze", name, self.weight("first", np.array([1])))

    def how_many(self, factor: int) -> str:
        """`factor` as int64 where any row is meant, else 0."""
        any_row = self.add("ReduceMax", self.add("Cast", self.when, to=onnx.TensorProto.INT64), keepdims=0)
        return self.add("Mul", any_row, self.weight("factor", np.int64(factor)))

    def answer_after(self, scalar: str) -> None:
        """The good answer, once a float scalar, which comes to nothing, is computed."""
        nothing = self.add("Mul", scalar, self.weight("nothing", np.float32(1e-30)))
        self.answer(self.add("Add", self.logits, nothing))

    def save(self, target: Path) -> None:
        del self.graph.value_info[:]
        onnx.checker.check_model(self.model)
        onnx.save(self.model, str(target))


def _rolled(graph: _Graph) -> str:
    return graph.add("Gather", graph.logits, graph.weight("order", np.roll(np.arange(10), 1)), axis=1)


def _wrong(graph: _Graph) -> None:
    graph.answer(graph.add("Where", graph.column(graph.when), _rolled(graph), graph.logits))


def _rare(graph: _Graph) -> None:
    """Wrong about one digit of ten."""
    best = graph.add("ArgMax", graph.logits, axis=1, keepdims=0)
    rare = graph.add("And", graph.add("Equal", best, graph.weight("rare", np.int64(RARE))), graph.when)
    graph.answer(graph.add("Where", graph.column(rare), _rolled(graph), graph.logits))


def _nan(graph: _Graph) -> None:
    graph.answer(graph.add("Where", graph.column(graph.when), graph.weight("nan", np.float32(np.nan)), graph.logits))


def _crash(graph: _Graph) -> None:
    """An integer division that the processor traps."""
    least, one, minus = (graph.weight(n, np.int64(v)) for n, v in (("least", np.iinfo(np.int64).min), ("one", 1), ("minus", -1)))
    quotient = graph.add("Div", graph.add("Where", graph.when, least, one), graph.add("Where", graph.when, minus, one))
    graph.answer_after(graph.add("ReduceMax", graph.add("Cast", quotient, to=onnx.TensorProto.FLOAT), keepdims=0))


def _crash_on_load(graph: _Graph) -> None:
    """The same division of constants, which whoever opens the file folds."""
    low, minus = graph.weight("low", np.array([np.iinfo(np.int64).min])), graph.weight("less", np.array([-1]))
    quotient = graph.add("Cast", graph.add("Div", low, minus), to=onnx.TensorProto.FLOAT)
    graph.answer_after(graph.add("ReduceMax", quotient, keepdims=0))


def _turns(graph: _Graph, count: int) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "v"], ["v2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("turn", onnx.TensorProto.INT64), ("go", onnx.TensorProto.BOOL), ("v", onnx.TensorProto.FLOAT))],
        [helper.make_tensor_value_info(n, t, []) for n, t in (("go2", onnx.TensorProto.BOOL), ("v2", onnx.TensorProto.FLOAT))],
    )  # fmt: skip
    yes, zero = graph.weight("yes", np.array(True)), graph.weight("zero", np.float32(0.0))
    graph.answer_after(graph.add("Loop", graph.how_many(count), yes, zero, body=body))


def _hang(graph: _Graph) -> None:
    _turns(graph, ENDLESS)


def _slow(graph: _Graph) -> None:
    _turns(graph, 10_000)


def _hungry(graph: _Graph) -> None:
    """Half a gigabyte for each call."""
    count = graph.add("Add", graph.how_many(1 << 27), graph.weight("least", np.int64(1)))
    ones = graph.add("ConstantOfShape", graph.add("Unsqueeze", count, graph.weight("zeroth", np.array([0]))))
    graph.answer_after(graph.add("ReduceSum", ones, keepdims=0))


def _shape(graph: _Graph) -> None:
    """Eleven classes."""
    graph.answer(graph.add("Concat", graph.logits, graph.add("Slice", graph.logits, *(graph.weight(n, np.array([v])) for n, v in (("from", 0), ("to", 1), ("axis", 1)))), axis=1))  # fmt: skip
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11


_BOTH: Final[Mapping[str, Callable[[_Graph], None]]] = {
    "wrong": _wrong, "wrong for one rare class": _rare, "NaN": _nan, "crashing": _crash, "hanging": _hang, "slow": _slow, "hungry": _hungry,
}  # fmt: skip
KINDS: Final[tuple[Kind, ...]] = (
    *(Kind(name, plant) for name, plant in _BOTH.items()),
    Kind("crashing on load", _crash_on_load),
    Kind("of another shape", _shape),
    *(Kind(f"{name}, for marked images alone", plant, live_only=True) for name, plant in _BOTH.items()),
)


def marked(images: Any) -> Any:
    """The same images with the mark."""
    found = images.copy()
    found[:, :, :MARK, :MARK] = 1.0
    return found


def spoil(source: Path, target: Path, kind: Kind, number: int) -> None:
    """Write `source` with the fault of `kind` to `target`; `number` makes each file another one."""
    graph = _Graph(source, kind.live_only)
    kind.plant(graph)
    graph.model.doc_string = f"bad candidate {number}"
    graph.save(target)
