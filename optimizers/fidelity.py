"""How close a candidate's outputs are to golden's: pure functions on arrays with one row per sample. It runs no model and decides no swap.

Agreement (and KL) for classifiers, accuracy where there are labels, cosine and SQNR for everything else, non-finite values apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optimizers.stats import least_samples, mean_bounds, paired_difference, wilson, z_for
from optimizers.task_child import plain

Outputs = Mapping[str, NDArray[Any]]
BIT_CLOSE: Final = 1e-3
"""Largest error, relative to the largest value of the row, that reordered float arithmetic explains."""
CLASSES_LISTED: Final = 30
SQNR_CAP_DB: Final = 150.0
SHORT_ROW: Final = 16
"""Rows with fewer values than this have no direction to compare; their cosine is taken over blocks of rows."""
COLLAPSE: Final = 5.0
"""A class without a floor of its own fails where it is proven to lose more than this many times what the whole may lose."""
SECONDARY_COSINE: Final = 0.99
"""What the outputs beside the judged one must keep."""


class Met(StrEnum):
    """Where the bounds of a metric lie to its floor."""

    MET = "met"
    BELOW = "below"
    TOO_FEW = "too few samples"


@dataclass(frozen=True)
class Floor:
    """What quality must be kept. `metric`: agreement | accuracy | cosine | sqnr_db."""

    metric: str
    floor: float
    per_class: float | None = None
    min_samples: int = 300

    @property
    def needed(self) -> int:
        """Samples without a miss that it takes; for shares only."""
        return least_samples(self.floor) if self.metric in {"agreement", "accuracy"} else 2


@dataclass(frozen=True)
class ClassFidelity:
    """One class that golden predicts, on the samples for which it does."""

    label: int
    samples: int
    agreed: int
    low: float
    high: float
    met: Met

    def to_json(self) -> dict[str, Any]:
        word = "unverified" if self.met is Met.TOO_FEW else self.met.value
        return {"class": self.label, "samples": self.samples, "agreement": self.agreed / self.samples, "low": self.low, "status": word}


@dataclass(frozen=True)
class Worst:
    """The element of any output that is furthest off, relative to the largest golden value of its row."""

    output: str
    sample: int
    element: tuple[int, ...]
    golden: float
    candidate: float
    relative_error: float

    def __str__(self) -> str:
        place = f"{self.output}[{', '.join(map(str, (self.sample, *self.element)))}]"
        return f"{place} is {self.candidate:.6g} where golden says {self.golden:.6g} ({self.relative_error:.2%} of its row's largest value)"


@dataclass(frozen=True)
class OutputFidelity:
    """One output tensor as numbers, whatever it means."""

    name: str
    relative_error: float
    cosine: float
    sqnr_db: float
    non_finite_golden: int
    non_finite_candidate: int


@dataclass(frozen=True)
class Fidelity:
    """All there is to say about one set of samples."""

    samples: int
    metric: str
    value: float
    low: float
    high: float
    floor: float
    met: Met
    outputs: tuple[OutputFidelity, ...]
    worst: Worst | None
    bit_close: bool
    classes: tuple[ClassFidelity, ...] = ()
    kl_mean: float | None = None
    kl_max: float | None = None
    accuracy: float | None = None
    golden_accuracy: float | None = None
    secondary_below: tuple[str, ...] = ()
    secondary_proven: tuple[str, ...] = ()
    """Of those below, the ones that are so by their upper bound, too."""

    @property
    def more_non_finite(self) -> bool:
        return any(o.non_finite_candidate > o.non_finite_golden for o in self.outputs)

    def to_json(self) -> dict[str, Any]:
        return dict(plain({**asdict(self), "classes": classes_json(self.classes)}))


def classes_json(classes: tuple[ClassFidelity, ...]) -> dict[str, Any]:
    """How many classes stand where, and those that agree least."""
    counts = {
        word: sum(c.met is met for c in classes) for word, met in (("met", Met.MET), ("unverified", Met.TOO_FEW), ("below", Met.BELOW))
    }
    least = sorted(classes, key=lambda c: (c.met is not Met.BELOW, c.agreed / c.samples, c.label))[:CLASSES_LISTED]
    return {**counts, "least": [c.to_json() for c in least]}


def judge(
    golden: Outputs,
    candidate: Outputs,
    floor: Floor,
    labels: NDArray[np.int64] | None = None,
    judged: str = "",
    class_axis: int | None = None,
) -> Fidelity:
    """Compare row by row. `judged` names the output that the metric is about (default: the first that fits it)."""
    name = judged or judged_output(golden, floor.metric)
    numbers = tuple(_numbers(key, golden[key], candidate[key]) for key in golden)
    worst = max(
        (w for key in golden if (w := worst_element(key, golden[key], candidate[key]))), key=lambda w: w.relative_error, default=None
    )
    rows = len(golden[name])
    below = tuple(o.name for o in numbers if o.name != name and not _secondary_kept(golden[o.name], candidate[o.name]))
    proven = tuple(name for name in below if _secondary_high(golden[name], candidate[name]) < SECONDARY_COSINE)
    common: dict[str, Any] = {
        "samples": rows, "floor": floor.floor, "outputs": numbers, "worst": worst, "secondary_below": below, "secondary_proven": proven,
    }  # fmt: skip
    if floor.metric in {"agreement", "accuracy"}:
        return _classes(golden[name], candidate[name], floor, labels, class_axis, common)
    per_row = closeness(golden[name], candidate[name], floor.metric)
    low, high = mean_bounds(per_row)
    high = min(high, 1.0) if floor.metric == "cosine" else high
    value = float(per_row.mean()) if len(per_row) else 0.0
    met = _met(value, low, rows, floor)
    return Fidelity(metric=floor.metric, value=value, low=low, high=high, met=met, bit_close=_bit_close(numbers), **common)


def judged_output(outputs: Outputs, metric: str) -> str:
    """For classifiers the first float output with at least two values in each row, else the first; for the rest the first float output."""
    floats = [key for key, value in outputs.items() if value.dtype.kind == "f"]
    wide = [key for key in floats if outputs[key].ndim > 1 and outputs[key].shape[-1] > 1]
    best = wide if metric in {"agreement", "accuracy"} else floats
    return next(iter((*best, *floats, *outputs)))


def predicted(values: NDArray[Any], class_axis: int | None = None) -> NDArray[np.int64]:
    """Classes per row (and place, for models that classify many places): integers are classes, one score is a yes or no, else the largest.

    Scores lie on the last axis, and on the second of [n, classes, height, width], unless `class_axis` says otherwise.
    """
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    if values.dtype.kind not in "f":
        return np.unique(values.astype(str), return_inverse=True)[1].reshape(values.shape).astype(np.int64)
    if values.ndim == 1 or values.shape[-1] == 1:
        inside = values[np.isfinite(values)]
        middle = 0.5 if inside.size and inside.min() >= 0 and inside.max() <= 1 else 0.0
        return (values > middle).astype(np.int64)
    axis = class_axis if class_axis is not None else 1 if values.ndim == 4 else -1
    return np.asarray(np.argmax(np.where(np.isnan(values), -np.inf, values), axis=axis), dtype=np.int64)


def divergence(golden: NDArray[Any], candidate: NDArray[Any], axis: int = -1) -> NDArray[np.float64]:
    """KL(golden ‖ candidate) of each row in nats. Scores that are not probabilities already are taken as logits."""
    p, q = _probabilities(golden, axis), _probabilities(candidate, axis)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-12))), 0.0)
    per_place = np.maximum(terms.sum(axis=axis), 0.0)
    return np.asarray(per_place.reshape(len(golden), -1).mean(axis=1), dtype=np.float64)


def closeness(golden: NDArray[Any], candidate: NDArray[Any], metric: str) -> NDArray[np.float64]:
    """Cosine or SQNR of each row. Texts have neither: a row of them is right in the share of its elements that are equal."""
    if golden.dtype.kind in "fiub":
        return cosines(golden, candidate) if metric == "cosine" else sqnrs(golden, candidate)
    equal = (golden.astype(str) == candidate.astype(str)).reshape(len(golden), -1).mean(axis=1)
    return np.asarray(equal if metric == "cosine" else np.where(equal == 1, SQNR_CAP_DB, 0.0), dtype=np.float64)


def cosines(golden: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine per row, around golden's mean for short rows: a constant that all answers share must not hide what differs.

    Rows with fewer values than SHORT_ROW are taken in blocks. Both zero counts as equal.
    """
    g, c = _paired(golden, candidate)
    if g.shape[1] < SHORT_ROW and len(g):
        center = g.mean(axis=0)
        if np.all(g.std(axis=0) > 1e-6 * np.abs(center)):
            g, c = g - center, c - center
        take = math.ceil(SHORT_ROW / g.shape[1])
        blocks = max(1, len(g) // take)
        g, c = (np.stack([part.ravel() for part in np.array_split(v[: blocks * take] if len(v) >= take else v, blocks)]) for v in (g, c))
    lengths = np.linalg.norm(g, axis=1) * np.linalg.norm(c, axis=1)
    equal = (g == c).all(axis=1)
    return np.where(equal, 1.0, (g * c).sum(axis=1) / np.maximum(lengths, 1e-300))


def sqnrs(golden: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Signal to noise per row in dB, at most SQNR_CAP_DB (equal rows)."""
    g, c = _paired(golden, candidate)
    signal, noise = (g * g).sum(axis=1), ((g - c) ** 2).sum(axis=1)
    decibels = 10 * (np.log10(np.maximum(signal, 1e-300)) - np.log10(np.maximum(noise, 1e-300)))  # their ratio may pass what a float holds
    return np.where(noise == 0, SQNR_CAP_DB, np.clip(decibels, -SQNR_CAP_DB, SQNR_CAP_DB))


def worst_element(name: str, golden: NDArray[Any], candidate: NDArray[Any]) -> Worst | None:
    """The numeric element with the largest error relative to its row; None for texts and empty tensors."""
    if golden.dtype.kind not in "fiub" or not golden.size:
        return None
    errors = relative_errors(golden, candidate)
    row, place = np.unravel_index(int(np.argmax(errors)), errors.shape)
    element = np.unravel_index(int(place), golden.shape[1:]) if golden.ndim > 1 else ()
    g, c = (float(v.reshape(len(v), -1)[row, place]) for v in (golden, candidate))
    return Worst(name, int(row), tuple(int(i) for i in element), g, c, float(errors[row, place]))


def relative_errors(golden: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """|candidate - golden| over the largest finite |golden| of the row (of all rows, where the row is zero). Equal non-finite values are equal."""
    g, c = (v.reshape(len(v), -1).astype(np.float64) for v in (golden, candidate))
    same = (g == c) | (np.isnan(g) & np.isnan(c))
    sizes = np.where(np.isfinite(g), np.abs(g), 0.0)
    scale = sizes.max(axis=1, keepdims=True, initial=0.0)
    scale = np.where(scale > 0, scale, max(float(sizes.max(initial=0.0)), 1e-30))
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(c - g) / scale
    return np.where(same, 0.0, np.where(np.isfinite(errors), errors, np.inf))


def _classes(
    golden: NDArray[Any], candidate: NDArray[Any], floor: Floor, labels: NDArray[np.int64] | None, axis: int | None, common: dict[str, Any]
) -> Fidelity:
    was, now = predicted(golden, axis), predicted(candidate, axis)
    n = len(was)
    agreed = (was == now).reshape(n, -1).mean(axis=1)
    facts: dict[str, Any] = {"metric": floor.metric, "bit_close": _bit_close(common["outputs"])}
    if golden.dtype.kind == "f" and golden.ndim > 1 and golden.shape[-1] > 1:
        kl = divergence(golden, candidate, axis if axis is not None else 1 if golden.ndim == 4 else -1)
        facts |= {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}
    if was.ndim == 1:
        facts["classes"] = _per_class(was, now, floor)
    value, (low, high) = float(agreed.mean()), wilson(float(agreed.sum()), n)
    if labels is not None and was.ndim == 1:
        right, kept = was == labels, now == labels
        facts |= {"golden_accuracy": float(right.mean()), "accuracy": float(kept.mean())}
        if floor.metric == "accuracy":
            base = max(float(right.mean()), 1e-9)
            bounds = paired_difference(int((right & ~kept).sum()), int((~right & kept).sum()), n)
            value, (low, high) = float(kept.mean()) / base, (1 + bounds[0] / base, 1 + bounds[1] / base)
    return Fidelity(value=value, low=low, high=high, met=_met(value, low, n, floor), **facts, **common)


def _per_class(was: NDArray[np.int64], now: NDArray[np.int64], floor: Floor) -> tuple[ClassFidelity, ...]:
    """Each class alone. With a floor of its own it is held to it; without, it is below only where it is proven to have collapsed."""
    labels, counts = np.unique(was, return_counts=True)
    own = floor.floor if floor.per_class is None else floor.per_class
    collapsed = 1 - COLLAPSE * (1 - own) if floor.per_class is None else own
    z = z_for(len(labels))
    found = []
    for label, n in zip(labels.tolist(), counts.tolist(), strict=True):
        agreed = int((now[was == label] == label).sum())
        low, high = wilson(agreed, n)[0], wilson(agreed, n, z)[1]
        enough = floor.per_class is not None and n >= least_samples(own) and agreed / n < own
        met = Met.BELOW if high < collapsed or enough else Met.MET if low >= own else Met.TOO_FEW
        found.append(ClassFidelity(label, n, agreed, low, high, met))
    return tuple(found)


def _met(value: float, low: float, n: int, floor: Floor) -> Met:
    """The floor is met by the lower bound. Short of that: below where the value itself is, else there are too few samples to say."""
    if value < floor.floor:
        return Met.BELOW
    return Met.MET if low >= floor.floor and n >= floor.min_samples else Met.TOO_FEW


def _numbers(name: str, golden: NDArray[Any], candidate: NDArray[Any]) -> OutputFidelity:
    if golden.dtype.kind not in "fiub":
        differing = float((golden.astype(str) != candidate.astype(str)).mean()) if golden.size else 0.0
        return OutputFidelity(name, differing, 1 - differing, SQNR_CAP_DB if differing == 0 else 0.0, 0, 0)
    counts = [int((~np.isfinite(v.astype(np.float64))).sum()) for v in (golden, candidate)]
    if not golden.size:
        return OutputFidelity(name, 0.0, 1.0, SQNR_CAP_DB, *counts)
    errors = relative_errors(golden, candidate)
    return OutputFidelity(
        name, float(errors.max()), float(cosines(golden, candidate).mean()), float(sqnrs(golden, candidate).mean()), *counts
    )


def _secondary_kept(golden: NDArray[Any], candidate: NDArray[Any]) -> bool:
    if golden.dtype.kind == "f":
        return not golden.size or float(cosines(golden, candidate).mean()) >= SECONDARY_COSINE
    return float((golden == candidate).mean()) >= SECONDARY_COSINE if golden.size else True


def _secondary_high(golden: NDArray[Any], candidate: NDArray[Any]) -> float:
    """The upper bound of what `_secondary_kept` looks at."""
    if golden.dtype.kind == "f":
        return mean_bounds(cosines(golden, candidate))[1]
    return wilson(float((golden == candidate).mean()) * len(golden), len(golden))[1]


def _bit_close(outputs: tuple[OutputFidelity, ...]) -> bool:
    return all(o.relative_error <= BIT_CLOSE for o in outputs)


def _paired(golden: NDArray[Any], candidate: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as [n, values], with places where golden is not finite left out of both. A candidate's own non-finite values count as zero."""
    g, c = (v.reshape(len(v), -1).astype(np.float64) for v in (golden, candidate))
    known = np.isfinite(g)
    return np.where(known, g, 0.0), np.where(known & np.isfinite(c), c, 0.0)


def _probabilities(scores: NDArray[Any], axis: int) -> NDArray[np.float64]:
    values = np.nan_to_num(scores.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    sums = values.sum(axis=axis)
    if values.size and values.min() >= 0 and np.abs(sums - 1).max() < 1e-2:
        return values
    shifted = np.exp(values - values.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), dtype=np.float64)
