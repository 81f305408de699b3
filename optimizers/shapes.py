"""Sizes of dynamic axes that the samples do not have, made from them by cutting and repeating, and whether a candidate follows golden there.

What golden itself refuses is no size of this model and is not held against anyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from optimizers.answers import Rows
from optimizers.fidelity import Fidelity, Floor, judge
from optimizers.measure import Arm, ArmFailed
from optimizers.objections import objections
from optimizers.samples import Samples
from optimizers.session import Feeds, TensorInfo

ROWS_TRIED: Final = 8
MOST_VARIANTS: Final = 8
Axis = tuple[str, int]


@dataclass(frozen=True)
class Variant:
    """`calls` of one row (or one whole call) each, with the axes of one symbol at another size."""

    label: str
    calls: tuple[Feeds, ...]


def shape_variants(inputs: Sequence[TensorInfo], samples: Samples) -> Iterator[Variant]:
    """Half of, one less than and twice each symbol's size in the samples; axes that share a symbol change together."""
    made = 0
    for symbol, axes in _symbols(inputs, samples.stacked).items():
        sizes = {samples.inputs[name].shape[axis if samples.stacked else axis + 1] for name, axis in axes}
        if len(sizes) != 1:
            continue
        size = sizes.pop()
        for other in sorted({max(1, size // 2), max(1, size - 1), size * 2} - {size}):
            if made == MOST_VARIANTS:
                return
            made += 1
            calls = tuple(_resized(samples, row, axes, other) for row in range(min(ROWS_TRIED, len(samples))))
            yield Variant(f"{symbol} = {other}", calls)


def _symbols(inputs: Sequence[TensorInfo], stacked: bool) -> dict[str, list[Axis]]:
    """Axes beyond the batch whose size is free, by symbol; an unnamed one stands for itself."""
    found: dict[str, list[Axis]] = {}
    for info in inputs:
        for axis, size in enumerate(info.shape):
            if isinstance(size, int) or (axis == 0 and stacked):
                continue
            found.setdefault(size or f"{info.name} axis {axis}", []).append((info.name, axis))
    return found


def _resized(samples: Samples, row: int, axes: list[Axis], size: int) -> Feeds:
    feeds = {name: values[row : row + 1] if samples.stacked else np.asarray(values[row]) for name, values in samples.inputs.items()}
    for name, axis in axes:
        values = feeds[name]
        feeds[name] = np.take(values, np.arange(size) % values.shape[axis], axis=axis)
    return feeds


@dataclass(frozen=True)
class Tried:
    """What came of one variant. `found` is None where the candidate gave nothing to compare."""

    label: str
    objections: tuple[str, ...]
    found: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "objections": list(self.objections), **(self.found.to_json() if self.found else {})}


def try_variant(
    variant: Variant, golden: Arm, candidate: Arm, floor: Floor, judged_output: str = "", class_axis: int | None = None
) -> Tried | None:
    """Both on one variant; None where golden refuses it. A few rows prove only what is badly wrong."""
    was: list[Rows] = []
    now: list[Rows] = []
    for feeds in variant.calls:
        try:
            was.append(_named(golden, feeds))
        except ArmFailed:
            return None
        try:
            now.append(_named(candidate, feeds))
        except ArmFailed as failed:
            return Tried(variant.label, (f"the candidate fails where golden answers: {failed}",))
        for name, values in was[-1].items():
            if values.shape != now[-1][name].shape:
                return Tried(variant.label, (f"output {name!r} has shape {list(now[-1][name].shape)}, golden's is {list(values.shape)}",))
    found = judge(_stacked(was), _stacked(now), floor, None, judged_output, class_axis)
    wrong = found.high < found.floor or found.more_non_finite
    return Tried(variant.label, tuple(objections(found)) if wrong else (), found)


def _named(arm: Arm, feeds: Feeds) -> Rows:
    return {info.name: np.asarray(value) for info, value in zip(arm.opened.outputs, arm.call(feeds), strict=True)}


def _stacked(calls: list[Rows]) -> Rows:
    """One row per call; a first axis of one that every output has is the batch, and goes."""
    rows = {name: np.stack([call[name] for call in calls]) for name in calls[0]}
    batched = all(values.ndim > 2 and values.shape[1] == 1 for values in rows.values())
    return {name: values[:, 0] for name, values in rows.items()} if batched else rows
