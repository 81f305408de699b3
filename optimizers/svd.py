"""Truncated SVD on the ONNX graph: layers with a constant matrix or kernel become two, where that is measured to pay. How ranks are chosen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import ModelProto

from optimizers.allotment import Choice, TooTight, allot
from optimizers.answers import feeds_of
from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.census import census, quantization_of
from optimizers.factors import Layer, halves, input_of, layers_of, split, whole
from optimizers.layer_times import in_turns
from optimizers.layers import elsewhere
from optimizers.low_rank import LowRankConfig
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import drop_unused_initializers, load, name_nodes, save
from optimizers.prepare import prepared
from optimizers.samples import Samples
from optimizers.session import Settings, open_session
from optimizers.trial import comparable

GAIN: Final = 0.95
"""A split layer must take less than this share of the whole one's time."""
LEVELS: Final = (0.75, 0.5, 0.25)
"""Shares of the largest rank that saves operations at which a layer is judged alone."""
STEPS: Final = 8
"""Ranks that are tried for a speed are eighths of it."""
_MODEL_OF_ONE: Final = "layer.onnx"


@dataclass(frozen=True)
class Split:
    """One layer and what its split is worth. `ratio`: time of the two layers over that of the one (None: not timed).

    `loss`: how much the model's outputs change when it alone is split, relative to their power (None: not judged).
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    energy: float
    ratio: float | None = None
    loss: float | None = None
    saves: bool = True


def build(artifact: Artifact, config: LowRankConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with layers split. Raises NotApplicable with ranks and times."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): low-rank needs a float model, and goes before int8")
    ready = prepared(source, folder)
    row = samples.row_shapes()
    layers = {layer.name: layer for layer in layers_of(ready.model, row, frozenset(config.exclude))}
    if not layers:
        raise NotApplicable(f"there is no MatMul, Gemm or ungrouped Conv with a constant float weight to split{elsewhere(ready.model)}")
    work = _Work(config, budget, folder)
    splits = work.by_sensitivity(ready.model, layers, samples) if config.rank == "sensitivity" else work.one_by_one(layers)
    chosen = [s for s in splits if s.saves and (s.ratio is None or s.ratio < GAIN)]
    if not chosen:
        raise NotApplicable(f"no layer is better off split {_aim(config)}: {_told(splits)}")
    for one in chosen:
        split(ready.model, layers[one.layer], one.rank)
    drop_unused_initializers(ready.model)
    name_nodes(ready.model)
    path = save(ready.model, folder / "model.onnx")
    before, after = (census(each, row=row) for each in (source, ready.model))
    facts = {
        "method": config.method, "rank": config.rank, "split": [vars(s) for s in chosen], "left": [vars(s) for s in splits if s not in chosen],
        "before": {"parameters": before.parameters, "multiply_adds": before.multiply_adds, "bytes": size_of(artifact.path)},
        "after": {"parameters": after.parameters, "multiply_adds": after.multiply_adds, "bytes": size_of(path)},
        "curves": work.curves, "rows_timed": config.rows if config.split == "faster" else None, "prepared": ready.facts,
        "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


class _Work:
    """How ranks are chosen, and what was measured on the way."""

    def __init__(self, config: LowRankConfig, budget: Budget, folder: Path) -> None:
        self._config, self._budget, self._folder = config, budget, folder
        self.curves: list[dict[str, Any]] = []

    def one_by_one(self, layers: dict[str, Layer]) -> list[Split]:
        """Each layer by its own spectrum, or by its own time."""
        found = []
        for at, layer in enumerate(layers.values()):
            self._tell(f"decomposing {layer.name}", 0.1 + 0.7 * at / len(layers))
            rank = layer.rank_of(self._config.energy) if self._config.rank == "energy" else self._rank_for_speed(layer)
            found.append(self._split(layer, rank))
        return found

    def by_sensitivity(self, model: ModelProto, layers: dict[str, Layer], samples: Samples) -> list[Split]:
        """Each layer split alone at several ranks and judged by the model's outputs; operations then go where that costs least."""
        if not len(samples):
            raise NotApplicable("rank=sensitivity judges by inputs, and there are none: name samples.calibration, or use rank=energy")
        rows = samples.rows(slice(0, self._config.judged))
        plain = self._outputs(model, rows)
        table: dict[str, list[Choice]] = {}
        ranks: dict[str, dict[str, int]] = {}
        for at, layer in enumerate(layers.values()):
            self._tell(f"judging {layer.name}", 0.1 + 0.6 * at / len(layers))
            ranks[layer.name] = {str(rank): rank for rank in sorted({round(layer.break_even * level) for level in LEVELS} - {0})}
            table[layer.name] = [Choice("whole", layer.operations, 0.0)]
            for name, rank in ranks[layer.name].items():
                twin = ModelProto.FromString(model.SerializeToString())
                split(twin, layer, rank)
                seen = self._outputs(twin, rows)
                comparable(twin, plain, seen)
                loss = _change(plain, seen)
                table[layer.name].append(Choice(name, layer.operations_at(rank), loss))
                self.curves.append({"layer": layer.name, "rank": rank, "saved": layer.operations - layer.operations_at(rank), "loss": loss})
        total = sum(layer.operations for layer in layers.values())
        try:
            allotted = allot(table, round(total * (1 - self._config.ratio)), "exact")
        except TooTight as tight:
            raise NotApplicable(f"{self._config.ratio:.0%} of the multiply-adds cannot go: {tight}") from None
        loss_of = {layer: choice.loss for layer, choice in allotted.items() if choice.name != "whole"}
        return [self._split(layers[layer], ranks[layer][allotted[layer].name], loss) for layer, loss in loss_of.items()]

    def _split(self, layer: Layer, rank: int, loss: float | None = None) -> Split:
        saves = rank <= layer.break_even
        ratio = self._time(layer, rank) if saves and self._config.split == "faster" else None
        return Split(layer.name, layer.shape, rank, float(layer.kept[rank - 1]), ratio, loss, saves)

    def _rank_for_speed(self, layer: Layer) -> int:
        """The largest rank, in eighths of what saves operations at all, at which the layer is `speed` × as fast; else one that is too large."""
        tried = sorted({round(layer.break_even * step / STEPS) for step in range(1, STEPS)} - {0})
        fits = 0
        while tried:  # by halves: time grows with the rank
            middle = tried[len(tried) // 2]
            fast = self._time(layer, middle) <= 1 / self._config.speed
            fits = middle if fast else fits
            tried = [rank for rank in tried if (rank > middle if fast else rank < middle)]
        return fits or min(layer.shape)

    def _time(self, layer: Layer, rank: int) -> float:
        """Time of the two layers over that of the one here."""
        rows = self._config.rows
        if layer.kernel and not layer.image:
            raise NotApplicable(f"the images that {layer.name} takes have no known size: name samples, or use split=fewer with rank=energy")
        feeds = {"x": input_of(layer, rows)}
        settings = Settings(intra_op_threads=self._budget.threads)
        one, two = (
            (open_session(save(made, self._folder / _MODEL_OF_ONE), settings), feeds)
            for made in (whole(layer, rows), halves(layer, rank, rows))
        )
        return in_turns(one, two)[1]

    def _outputs(self, model: ModelProto, rows: Samples) -> list[Any]:
        session = open_session(save(model, self._folder / "judged.onnx"), Settings(intra_op_threads=self._budget.threads))
        index = [np.arange(len(rows))] if rows.stacked else [np.array([i]) for i in range(len(rows))]
        return [values for each in index for values in session.run(None, feeds_of(rows, each))]

    def _tell(self, step: str, share: float) -> None:
        self._budget.tick(self._config.method, step, share)


def _change(plain: list[Any], other: list[Any]) -> float:
    """Σ of squared differences over Σ of squares, of all outputs that are floats."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(plain, other, strict=True) if a.dtype.kind == "f"]
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs) / max(sum(float((a**2).sum()) for a, _ in pairs), 1e-300)


def _aim(config: LowRankConfig) -> str:
    match config.rank:
        case "speed":
            return f"at {config.speed:g} × the speed"
        case "sensitivity":
            return f"where {config.ratio:.0%} of the multiply-adds would go"
    return f"at {config.energy:.0%} of its energy"


def _told(splits: list[Split]) -> str:
    said = [
        f"{s.layer} {list(s.shape)} rank {s.rank}"
        + (f", {s.ratio:.2f} of its time" if s.ratio is not None else "" if s.saves else ", more operations")
        for s in splits[:8]
    ]
    return "; ".join(said) + (f"; and {len(splits) - 8} more" if len(splits) > 8 else "")
