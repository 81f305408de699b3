"""Two arms answer the same samples, in batches of varied size; their outputs come back by name with one row per sample.

It says whose fault a failure is, and stops when time or memory is over with what it has. It compares nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optimizers.measure import Arm, ArmFailed
from optimizers.samples import Samples
from optimizers.session import Feeds

Rows = dict[str, NDArray[Any]]
OUTPUT_BYTES: Final = 256 << 20
"""Outputs kept per side; samples beyond are not judged, and the report says how many were."""
CHUNK: Final = 32


class Fault(Exception):
    """One side failed. `side` is golden, incumbent or candidate."""

    def __init__(self, side: str, text: str) -> None:
        super().__init__(text)
        self.side = side


@dataclass(frozen=True)
class Answers:
    """Outputs of both sides for the samples `index` (in this order)."""

    golden: Rows
    candidate: Rows
    index: NDArray[np.intp]


def feeds_of(samples: Samples, index: Sequence[int] | NDArray[np.intp]) -> Feeds:
    """One call with these rows; where samples are whole calls, exactly one of them."""
    if samples.stacked:
        return {name: values[np.asarray(index)] for name, values in samples.inputs.items()}
    return {name: np.asarray(values[index[0]]) for name, values in samples.inputs.items()}


def side_by_side(
    golden: Arm | Rows,
    candidate: Arm,
    samples: Samples,
    sizes: tuple[Sequence[int], Sequence[int]],
    *,
    until: float,
    tick: Callable[[float], None] = lambda share: None,
) -> Answers:
    """Both sides on all samples in a spread order, in turns, golden and candidate each in cycling batch `sizes`.

    `golden` may be the outputs that it gave before. Ends at `until` (time.monotonic) at the latest, but for the first chunk.
    """
    order = np.random.default_rng(0).permutation(len(samples))
    parts: tuple[list[Rows], list[Rows]] = ([], [])
    done = kept = 0
    while done < len(order) and (not done or (time.monotonic() < until and kept < OUTPUT_BYTES)):
        chunk = order[done : done + max(CHUNK, sum(sizes[1]))]
        if isinstance(golden, Arm):
            parts[0].append(answers_of(golden, samples, chunk, sizes[0], "golden"))
        else:
            parts[0].append({name: values[chunk] for name, values in golden.items()})
        parts[1].append(answers_of(candidate, samples, chunk, sizes[1], "candidate"))
        done += len(chunk)
        kept += sum(values.nbytes for values in parts[0][-1].values())
        tick(done / len(order))
    return Answers(_joined(parts[0], "golden"), _joined(parts[1], "candidate"), order[:done])


def answers_of(arm: Arm, samples: Samples, index: NDArray[np.intp], sizes: Sequence[int], side: str) -> Rows:
    """Outputs of one side, in cycling batch sizes. Raises Fault."""
    batches: list[NDArray[np.intp]] = []
    at = 0
    while at < len(index):
        size = sizes[len(batches) % len(sizes)] if samples.stacked else 1
        batches.append(index[at : at + size])
        at += size
    feeds = [feeds_of(samples, rows) for rows in batches]
    try:
        answers = arm.calls(feeds)
    except ArmFailed as failed:
        if failed.how != "error":
            raise Fault(side, f"{side} breaks down: {failed}") from None
        answers = [_alone(arm, each, len(rows), side) for each, rows in zip(feeds, batches, strict=True)]
    return _joined(
        [_named(arm, outputs, len(rows) if samples.stacked else None, side) for outputs, rows in zip(answers, batches, strict=True)], side
    )


def _alone(arm: Arm, feeds: Feeds, rows: int, side: str) -> list[Any]:
    """One call by itself, to say at which batch size it fails."""
    try:
        return arm.call(feeds)
    except ArmFailed as failed:
        raise Fault(side, f"{side} fails at batch {rows}: {failed}") from None


def _named(arm: Arm, outputs: list[Any], rows: int | None, side: str) -> Rows:
    """Outputs by name; those of a whole call get an axis of samples, unless their own first axis is just that."""
    named = {info.name: np.asarray(value) for info, value in zip(arm.opened.outputs, outputs, strict=True)}
    if rows is None:
        one = all(value.ndim > 1 and value.shape[0] == 1 for value in named.values())
        return {name: value if one else value[None] for name, value in named.items()}
    for name, value in named.items():
        if value.ndim == 0 or value.shape[0] != rows:
            raise Fault(side, f"{side}: output {name!r} has shape {list(value.shape)} at batch {rows}; its first axis is not the batch")
    return named


def _joined(pieces: list[Rows], side: str) -> Rows:
    """All pieces as one. Raises Fault where the shapes of whole calls differ."""
    joined = {}
    for name in pieces[0]:
        shapes = Counter(piece[name].shape[1:] for piece in pieces)
        if len(shapes) > 1:
            raise Fault(
                side,
                f"output {name!r} of {side} has a different shape for each sample ({', '.join(str(list(s)) for s in list(shapes)[:3])}), "
                "and only answers of one shape can be compared: name samples that have such",
            )
        joined[name] = np.concatenate([piece[name] for piece in pieces])
    return joined
