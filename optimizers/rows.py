"""Whether a model's rows are independent: a row alone has the answer that it has in any company, at any place of a batch.

What is not proven here is served unbatched. It runs a session that somebody else opened, on inputs that somebody else made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from optimizers.difference import difference, scale_of
from optimizers.inputs import scaled, take
from optimizers.running import Run, RunRefused
from optimizers.session import Feeds, TensorInfo

ROWS: Final = 5
FEW_ROWS: Final = 3
"""Rows for a model that takes long: fewer batches are tried then, and the proof says which."""
LARGE_MATES: Final = 1000.0
TOLERANCE: Final = {"FP32": 1e-3, "FP64": 1e-3, "FP16": 1e-2, "BF16": 2e-2}
QUANTIZED_TOLERANCE: Final = 2e-2
"""Shares of the largest output. Kernels differ with the batch by about 1e-6; in an int8 model that can flip a rounding, hence more."""
PER_BATCH: Final = frozenset({
    "DynamicQuantizeLinear", "com.microsoft:DynamicQuantizeMatMul", "com.microsoft:DynamicQuantizeLSTM",
})  # fmt: skip
"""Operators that scale activations over all rows at once (onnxruntime#10111)."""


@dataclass(frozen=True)
class RowsProof:
    """`error` is the worst difference seen, as a share of the largest output; `batches` the batch sizes tried.

    `stated` means that the owner said so: then the numbers are only what was seen beside it.
    """

    independent: bool
    reason: str
    stated: bool = False
    error: float = 0.0
    tolerance: float = 0.0
    batches: tuple[int, ...] = ()


def shape_objection(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> str:
    """Why requests could not share a call whatever the model computes, or ''."""
    for what, infos in (("input", inputs), ("output", outputs)):
        for info in infos:
            if not info.shape:
                return f"{what} {info.name!r} is a scalar: it has no batch axis"
            if isinstance(info.shape[0], int):
                return f"{what} {info.name!r} has its first axis fixed to {info.shape[0]}"
    return ""


def per_batch_objection(op_types: dict[str, int]) -> str:
    """Why the operators make a row's answer hang on its batch-mates, or ''."""
    found = sorted(PER_BATCH & set(op_types))
    return f"{found[0]} scales activations over the whole batch, so an answer changes with the company" if found else ""


def prove(run: Run, rows: Feeds, tolerance: float, tick: Callable[[float], None] = lambda share: None) -> RowsProof:
    """Run `rows` (ROWS of them, or FEW_ROWS) alone and in company. `run` raises RunRefused where the model does not take a batch."""
    count = len(next(iter(rows.values())))
    try:
        alone = [run(take(rows, [i])) for i in range(count)]
    except RunRefused as refused:
        return RowsProof(False, f"not proven: the model does not take all rows that were made up ({refused}); name samples", False)
    scales = [scale_of([answers[k] for answers in alone]) for k in range(len(alone[0]))]
    again = difference(alone[0], run(take(rows, [0])), scales)
    if again > tolerance:
        return RowsProof(
            False, f"the same row alone gives different answers (by {again:.2g}): the model is random", False, again, tolerance, (1,)
        )
    worst, sizes = 0.0, {1}
    trials = list(_companies(rows, count))
    for step, (what, feeds, members) in enumerate(trials):
        tick(step / len(trials))
        size = len(next(iter(feeds.values())))
        sizes.add(size)
        try:
            together = run(feeds)
        except RunRefused as refused:
            return RowsProof(
                False, f"a batch of {size} fails, though the shapes promise any: {refused}", False, worst, tolerance, tuple(sorted(sizes))
            )
        if misfit := _misfit(together, size):
            return RowsProof(False, misfit, False, worst, tolerance, tuple(sorted(sizes)))
        for position, row in members:
            seen = difference(alone[row], [values[position : position + 1] for values in together], scales)
            if seen > tolerance:
                reason = f"a row's answer differs by {seen:.2g} at position {position} of {size} {what} (tolerance {tolerance:g}): rows are not independent"
                return RowsProof(False, reason, False, seen, tolerance, tuple(sorted(sizes)))
            worst = max(worst, seen)
    reason = f"rows alone = rows together within {worst:.1g} (tolerance {tolerance:g}), in batches of {', '.join(map(str, sorted(sizes)))}"
    return RowsProof(True, reason, False, worst, tolerance, tuple(sorted(sizes)))


def _companies(rows: Feeds, count: int) -> Iterator[tuple[str, Feeds, list[tuple[int, int]]]]:
    """Batches to try: what they are, their inputs, and (position, row) of each member whose answer is known."""
    everyone = list(range(count))
    orders = [[0, 1], [1, 2, 0]]
    if count > FEW_ROWS:
        orders += [everyone[::-1], everyone[2:] + everyone[:2], [i % count for i in range(17)]]
    for order in orders:
        yield "rows", take(rows, order), list(enumerate(order))
    companies = ((LARGE_MATES, "among rows 1,000 times larger"), (0.0, "among zeros"))
    for factor, what in companies[: 2 if count > FEW_ROWS else 1]:
        mates = scaled(rows, factor)
        for position in sorted({0, count // 2, count - 1}):
            feeds = {name: values.copy() for name, values in mates.items()}
            for name, values in rows.items():
                feeds[name][position] = values[position]
            yield what, feeds, [(position, position)]


def _misfit(outputs: list[Any], size: int) -> str:
    for index, values in enumerate(outputs):
        shape = np.shape(values)
        if not shape or shape[0] != size:
            return f"output {index} has shape {list(shape)} for {size} rows: its first axis is not the batch"
    return ""
