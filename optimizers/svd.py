"""Truncated SVD of linear layers on the ONNX graph: MatMul and Gemm with a constant weight become two, where that is measured to pay."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.census import census, quantization_of
from optimizers.low_rank import LowRankConfig
from optimizers.onnx_graph import attributes, constants, drop_unused_initializers, initializers, load, name_nodes, save, set_constant
from optimizers.prepare import prepared
from optimizers.samples import Samples
from optimizers.session import Settings, open_session

TIMED_S: Final = 0.15
ROUNDS: Final = 5
GAIN: Final = 0.95
"""A split layer must take less than this share of the whole one's time."""


@dataclass(frozen=True)
class Split:
    """One layer and what its split is worth. `ratio`: time of the two products over that of the one (None: not timed)."""

    layer: str
    shape: tuple[int, int]
    rank: int
    energy: float
    ratio: float | None = None

    @property
    def saves(self) -> bool:
        k, n = self.shape
        return self.rank * (k + n) < k * n


def build(artifact: Artifact, config: LowRankConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with layers split. Raises NotApplicable with ranks and times."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): low-rank needs a float model, and goes before int8")
    ready = prepared(source, folder)
    model = ready.model
    layers = _layers(model, set(config.exclude))
    if not layers:
        raise NotApplicable("there is no MatMul or Gemm with a constant float weight to split")
    splits, factors = [], {}
    for at, (node, weight) in enumerate(layers):
        budget.tick(config.method, f"decomposing {node.name}", 0.1 + 0.7 * at / len(layers))
        split, pair = decomposed(node.name, weight, config.energy)
        if split.saves and config.split == "faster":
            split = Split(split.layer, split.shape, split.rank, split.energy, _ratio(weight, pair, config.rows, folder, budget.threads))
        splits.append(split)
        factors[node.name] = pair
    chosen = [s for s in splits if s.saves and (s.ratio is None or s.ratio < GAIN)]
    if not chosen:
        raise NotApplicable(f"no layer is better off split at {config.energy:.0%} of its energy: {_told(splits)}")
    for split in chosen:
        _rewrite(model, split.layer, *factors[split.layer])
    drop_unused_initializers(model)
    name_nodes(model)
    path = save(model, folder / "model.onnx")
    rows = {name: (1, *values.shape[1:]) for name, values in samples.inputs.items()} if samples.stacked else None
    before, after = (census(each, row=rows) for each in (source, model))
    facts = {
        "method": config.method, "energy": config.energy, "split": [vars(s) for s in chosen], "left": [vars(s) for s in splits if s not in chosen],
        "before": {"parameters": before.parameters, "multiply_adds": before.multiply_adds, "bytes": artifact.path.stat().st_size},
        "after": {"parameters": after.parameters, "multiply_adds": after.multiply_adds, "bytes": path.stat().st_size},
        "rows_timed": config.rows if config.split == "faster" else None, "prepared": ready.facts, "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def decomposed(layer: str, weight: NDArray[Any], energy: float) -> tuple[Split, tuple[NDArray[Any], NDArray[Any]]]:
    """`weight` [k, n] as [k, r] times [r, n] with the least r that keeps `energy` of Σ σ²."""
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    kept = np.cumsum(s**2) / max(float((s**2).sum()), 1e-300)
    rank = min(int(np.searchsorted(kept, energy)) + 1, len(s))
    root = np.sqrt(s[:rank])
    pair = (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)
    return Split(layer, (weight.shape[0], weight.shape[1]), rank, float(kept[rank - 1])), pair


def _layers(model: ModelProto, excluded: set[str]) -> list[tuple[NodeProto, NDArray[Any]]]:
    """Products with a constant matrix [k, n] of floats on their right."""
    floats = {name for name, tensor in initializers(model.graph).items() if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2}
    values = constants(model.graph)
    found = []
    for node in model.graph.node:
        if node.op_type not in {"MatMul", "Gemm"} or node.input[1] not in floats or node.name in excluded:
            continue
        how = attributes(node) if node.op_type == "Gemm" else {}
        if how.get("transA", 0) or how.get("alpha", 1.0) != 1.0:
            continue
        weight = values[node.input[1]]
        found.append((node, weight.T if how.get("transB", 0) else weight))
    return found


def _rewrite(model: ModelProto, layer: str, first: NDArray[Any], second: NDArray[Any]) -> None:
    """x W (+ b) becomes (x A) B (+ b) in the place of the node called `layer`."""
    graph = model.graph
    at, node = next((i, n) for i, n in enumerate(graph.node) if n.name == layer)
    names = f"{node.output[0]}.low_rank_a", f"{node.output[0]}.low_rank_b"
    for name, value in zip(names, (first, second), strict=True):
        set_constant(graph, name, value)
    between = f"{node.output[0]}.low_rank"
    thin = helper.make_node("MatMul", [node.input[0], names[0]], [between], name=f"{layer}.thin")
    node.input[0], node.input[1] = between, names[1]
    for attribute in [a for a in node.attribute if a.name == "transB"]:
        node.attribute.remove(attribute)
    graph.node.insert(at, thin)


def _ratio(weight: NDArray[Any], pair: tuple[NDArray[Any], NDArray[Any]], rows: int, folder: Path, threads: int) -> float:
    """Time of x A B over that of x W here, the median of rounds in turns, by CPU time of this process."""
    sessions = [
        open_session(save(_product(list(parts)), folder / f"timed{i}.onnx"), Settings(intra_op_threads=threads))
        for i, parts in enumerate(((weight,), pair))
    ]
    x = {"x": np.random.default_rng(0).standard_normal((rows, weight.shape[0])).astype(np.float32)}
    ratios = []
    for _ in range(ROUNDS):
        whole, split = (timed(session, x, TIMED_S / ROUNDS) for session in sessions)
        ratios.append(split / whole)
    return float(np.median(ratios))


def timed(session: Any, feeds: dict[str, Any], seconds: float) -> float:
    """CPU seconds of one call."""
    session.run(None, feeds)
    started, calls = time.process_time(), 0
    while time.process_time() - started < seconds:
        session.run(None, feeds)
        calls += 1
    return (time.process_time() - started) / max(calls, 1)


def _product(weights: list[NDArray[Any]]) -> ModelProto:
    names = ["x", *(f"h{i}" for i in range(len(weights) - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "product", [value("x", TensorProto.FLOAT, ["N", weights[0].shape[0]])], [value("y", TensorProto.FLOAT, ["N", weights[-1].shape[1]])],
        [numpy_helper.from_array(np.ascontiguousarray(w, dtype=np.float32), f"w{i}") for i, w in enumerate(weights)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _told(splits: list[Split]) -> str:
    said = [
        f"{s.layer} {list(s.shape)} rank {s.rank}"
        + (f", {s.ratio:.2f} of its time" if s.ratio is not None else "" if s.saves else ", more operations")
        for s in splits[:8]
    ]
    return "; ".join(said) + (f"; and {len(splits) - 8} more" if len(splits) > 8 else "")
