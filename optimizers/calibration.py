"""Ranges of activations from samples, in bounded memory: activations are looked at in slices and forgotten, never collected.

Two passes: exact minima and maxima, then (where the method asks) histograms over that range; from those a range is chosen per tensor.
Knows nothing of what will be quantized with the ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from optimizers.base import NotApplicable
from optimizers.onnx_graph import save
from optimizers.running import runner
from optimizers.samples import Samples
from optimizers.session import Settings, open_session
from optimizers.uniform import affine_grid, mean_square_error

METHODS: Final = ("minmax", "moving_average", "percentile", "entropy", "mse")
BINS: Final = 2048
SHRINKINGS: Final = 100
SLICE_BYTES: Final = 64 << 20
"""Activations held at once; a slice of samples, and of tensors, is cut to it (one tensor of one sample is the least)."""
SEEN_PER_ROW: Final = 1 << 13
SEEN_AT_LEAST: Final = 1 << 21
"""Elements of one tensor that enter its histogram, per sample and over all of them, evenly spaced; minimum and maximum are always exact."""
Tick = Callable[[str, float], None]
Range = tuple[float, float]


@dataclass
class Statistics:
    """What is kept of one tensor: extremes, moving averages of each sample's extremes, and a histogram over [low, high].

    Zeros are counted apart: they lie on every grid, and half of what a ReLU gives would drown the rest.
    """

    low: float = math.inf
    high: float = -math.inf
    average_low: float = math.nan
    average_high: float = math.nan
    zeros: float = 0.0
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    def extend(self, rows: NDArray[Any], averaging: float) -> None:
        flat = rows.reshape(len(rows), -1)
        lows, highs = flat.min(axis=1), flat.max(axis=1)
        self.low, self.high = min(self.low, float(lows.min())), max(self.high, float(highs.max()))
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            if math.isnan(self.average_low):
                self.average_low, self.average_high = low, high
            self.average_low += averaging * (low - self.average_low)
            self.average_high += averaging * (high - self.average_high)

    def count(self, rows: NDArray[Any], per_row: int) -> None:
        flat = rows.reshape(len(rows), -1)
        step = max(1, flat.shape[1] // per_row)
        seen = flat[:, ::step]
        other = seen[seen != 0]
        self.zeros += seen.size - other.size
        if self.high > self.low:
            self.counts += np.histogram(other, BINS, (self.low, self.high))[0]

    @property
    def centres(self) -> NDArray[np.float64]:
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[:-1] + edges[1:]) / 2)


@dataclass(frozen=True)
class Calibration:
    """How ranges are chosen. `percentile` is the share (in %) of values kept; `averaging` the weight of each new sample."""

    method: str = "minmax"
    percentile: float = 99.99
    averaging: float = 0.05


def calibrate(
    model: ModelProto, names: Sequence[str], samples: Samples, how: Calibration, folder: Path, tick: Tick, threads: int = 1
) -> dict[str, Range]:
    """The range of each of `names` (float values of `model`) over `samples`. `folder` is for a scratch file.

    Raises NotApplicable naming the tensor whose activations are not finite.
    """
    observed = Activations(model, names, samples, folder, threads)
    kept = {name: Statistics() for name in names}
    for share, name, rows in observed:
        tick("ranges", share / 2)
        if not np.isfinite(rows).all():
            raise NotApplicable(f"the activations of {name!r} are not finite on the calibration samples")
        kept[name].extend(rows, how.averaging)
    if how.method in {"percentile", "entropy", "mse"}:
        per_row = max(SEEN_PER_ROW, SEEN_AT_LEAST // len(samples))
        for share, name, rows in observed:
            tick("histograms", 0.5 + share / 2)
            kept[name].count(rows, per_row)
    return {name: choose_range(statistics, how) for name, statistics in kept.items()}


class Activations:
    """Iterating runs the model over the samples and yields (share done, name, rows of that activation), a slice at a time."""

    def __init__(self, model: ModelProto, names: Sequence[str], samples: Samples, folder: Path, threads: int) -> None:
        self.names, self.samples = list(names), samples
        augmented = ModelProto()
        augmented.CopyFrom(model)
        present = {value.name for value in augmented.graph.output}
        augmented.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in present)
        self.session = open_session(save(augmented, folder / "augmented.onnx"), Settings(intra_op_threads=threads, graph_level="basic"))
        self.run = runner(self.session)
        self.row_bytes = self._measure()

    def _measure(self) -> dict[str, int]:
        """Bytes of each activation for one sample; found group by group so that even this stays bounded."""
        found: dict[str, int] = {}
        for name in self.names:
            found[name] = int(self.session.run([name], self._feeds(0, 1))[0].nbytes)
        return found

    def _feeds(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        if not self.samples.stacked:
            return {name: values[start] for name, values in self.samples.inputs.items()}
        return {name: values[start:stop] for name, values in self.samples.inputs.items()}

    def _groups(self) -> Iterator[list[str]]:
        group: list[str] = []
        held = 0
        for name in self.names:
            if group and held + self.row_bytes[name] > SLICE_BYTES:
                yield group
                group, held = [], 0
            group.append(name)
            held += self.row_bytes[name]
        if group:
            yield group

    def __iter__(self) -> Iterator[tuple[float, str, NDArray[Any]]]:
        groups = list(self._groups())
        total = len(self.samples) * len(groups)
        for g, group in enumerate(groups):
            rows = max(1, SLICE_BYTES // max(1, sum(self.row_bytes[name] for name in group))) if self.samples.stacked else 1
            rows = min(rows, 32)
            for start in range(0, len(self.samples), rows):
                feeds = self._feeds(start, start + rows)
                values = self.session.run(group, feeds)
                for name, value in zip(group, values, strict=True):
                    together = value if self.samples.stacked and value.ndim else value[None]
                    yield (g * len(self.samples) + start) / total, name, together


def choose_range(kept: Statistics, how: Calibration) -> Range:
    """The range to quantize a tensor over, by `how.method`; always inside its exact extremes."""
    match how.method:
        case "minmax":
            return kept.low, kept.high
        case "moving_average":
            return kept.average_low, kept.average_high
        case "percentile":
            return _percentile(kept, how.percentile)
        case "entropy":
            return _least(kept, _divergence)
        case "mse":
            return _least(kept, _square_error)
    raise ValueError(f"calibration {how.method!r} is unknown; there are {', '.join(METHODS)}")


def _percentile(kept: Statistics, percentile: float) -> Range:
    """Both tails share what is cut, but for values of one sign, whose only tail takes all."""
    counts = kept.counts.copy()
    counts[int(np.argmin(np.abs(kept.centres)))] += kept.zeros if kept.low <= 0 <= kept.high else 0
    if kept.counts.sum() == 0 or percentile >= 100:
        return kept.low, kept.high
    cut = 1 - percentile / 100
    below, above = (0.0, cut) if kept.low >= 0 else (cut, 0.0) if kept.high <= 0 else (cut / 2, cut / 2)
    edges = np.linspace(kept.low, kept.high, BINS + 1)
    cumulative = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    low = edges[np.searchsorted(cumulative, below, side="right") - 1]
    high = edges[min(BINS, int(np.searchsorted(cumulative, 1 - above, side="left")))]
    return float(low), float(high)


def _least(kept: Statistics, loss: Callable[[Statistics, float, float], float]) -> Range:
    """The range, shrunk towards zero step by step, at which `loss` is least. Ties go to the wider one."""
    if kept.counts.sum() == 0:
        return kept.low, kept.high
    reach = max(abs(kept.low), abs(kept.high))
    ranges = [(max(kept.low, -reach * t), min(kept.high, reach * t)) for t in np.linspace(1.0, 0.05, SHRINKINGS)]
    losses = [loss(kept, low, high) for low, high in ranges]
    low, high = ranges[int(np.argmin(losses))]
    return float(low), float(high)


def _square_error(kept: Statistics, low: float, high: float) -> float:
    return mean_square_error(kept.centres, affine_grid(low, high, 8), kept.counts)


def _divergence(kept: Statistics, low: float, high: float) -> float:
    """KL(P ‖ Q): P the values clipped into [low, high], Q what 256 levels leave of those inside (Migacz, TensorRT, 2017)."""
    inside = (kept.centres >= low) & (kept.centres <= high)
    counts = kept.counts[inside]
    if counts.size < 256 or counts.sum() == 0:
        return math.inf
    clipped = counts.copy()
    clipped[0] += kept.counts[kept.centres < low].sum()
    clipped[-1] += kept.counts[kept.centres > high].sum()
    level = np.arange(counts.size) * 256 // counts.size
    present = counts > 0
    members = np.bincount(level, present, 256)
    coarse = np.where(present, (np.bincount(level, counts, 256) / np.maximum(members, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1.0)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))
