"""What a version does here when all is well: learned from its first quiet blocks, and what a block now is over it. Pure; it suspects nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from app.control.quality import LEAST_PAIRS
from app.telemetry.block import Block, Size
from app.telemetry.likeness import Likeness
from app.telemetry.window import ENOUGH

LEAST_CALLS: Final = ENOUGH
BASE_BLOCKS: Final = 3
"""Undisturbed blocks with traffic that make up what is normal."""
REFUSED_LIMIT: Final = 0.02
LEAST_ROWS: Final = 100
SHAPES_LIMIT: Final = 0.5
"""Distance of the mix of row sizes from the normal one at which it is other traffic."""
BASE_LABELS: Final = 100
"""Labels that make up what share is right when all is well."""


@dataclass(frozen=True, slots=True)
class Normal:
    """What a version does when all is well here, learned from its first quiet blocks; nothing is learned while it is stepped down or on trial."""

    costs: Mapping[Size, float] = field(default_factory=dict)
    """Median CPU seconds per row."""
    p95_s: float = 0.0
    memory_bytes: int = 0
    mean_batch: float = 0.0
    stretch: float = 0.0
    """The middle call's wall time over its CPU time."""
    blocks: int = 0
    labelled: int = 0
    right: int = 0
    likeness: Likeness = field(default_factory=Likeness)
    """How its first answers stood to golden's."""
    shapes: Mapping[int, float] = field(default_factory=dict)
    """Shares of the rows by their size, as in a bucket."""

    @property
    def known(self) -> bool:
        return self.blocks >= BASE_BLOCKS


def learned(normal: Normal, block: Block, memory_bytes: int) -> Normal:
    """`normal` with one more block taken in; the same where it is complete, or the block tells nothing."""
    if normal.known or block.disturbed or block.requests < LEAST_CALLS or block.failures or block.refused:
        return normal
    if block.expired > REFUSED_LIMIT * block.offered:
        return normal
    count = normal.blocks
    costs = dict(normal.costs)
    for bucket, cost in block.costs_by_size().items():
        median = cost.cpu.quantile(0.5)
        if median is not None and cost.calls >= LEAST_CALLS:
            known = costs.get(bucket)
            costs[bucket] = median if known is None else (known * count + median) / (count + 1)
    p95 = block.total.quantile(0.95) or 0.0

    def mean(before: float, now: float) -> float:
        return (before * count + now) / (count + 1)

    return replace(
        normal, costs=costs, p95_s=mean(normal.p95_s, p95), memory_bytes=max(normal.memory_bytes, memory_bytes),
        mean_batch=mean(normal.mean_batch, block.called_rows / block.calls if block.calls else 0.0),
        stretch=mean(normal.stretch, block.stretch.quantile(0.5) or 0.0),
        blocks=count + 1,
    )  # fmt: skip


def with_news(normal: Normal, block: Block) -> Normal:
    """Buckets never met before become normal when first met, since what they ought to cost is not known; and so do the first labels."""
    if normal.labelled < BASE_LABELS:
        normal = replace(normal, labelled=normal.labelled + block.labelled, right=normal.right + block.right)
    if normal.likeness.entropy.count < LEAST_PAIRS and block.likeness.entropy.count:
        likeness = Likeness()
        likeness.merge(normal.likeness)
        likeness.merge(block.likeness)
        normal = replace(normal, likeness=likeness)
    if not normal.shapes and normal.known:
        normal = replace(normal, shapes=shapes_of(block))
    new = {
        bucket: median
        for bucket, cost in block.costs_by_size().items()
        if bucket not in normal.costs and cost.calls >= LEAST_CALLS and (median := cost.cpu.quantile(0.5)) is not None
    }
    if not new or not normal.known:
        return normal
    return replace(normal, costs={**normal.costs, **new})


def shapes_of(block: Block) -> dict[int, float]:
    """Shares of a block's rows by their size (a power of two of bytes); none where there are too few."""
    rows: dict[int, int] = {}
    for (_, size), cost in block.costs_by_size().items():
        rows[size] = rows.get(size, 0) + cost.rows
    total = sum(rows.values())
    return {size: count / total for size, count in rows.items()} if total >= LEAST_ROWS else {}


def shape_shift(block: Block, normal: Normal) -> float | None:
    """Total variation distance of the rows' sizes from what is normal: 0 the same, 1 nothing in common; None with too few."""
    now = shapes_of(block)
    if not now or not normal.shapes:
        return None
    return sum(abs(now.get(size, 0.0) - normal.shapes.get(size, 0.0)) for size in now.keys() | normal.shapes.keys()) / 2


def other_shapes(normal: Normal, block: Block) -> Normal | None:
    """`normal` for the new traffic, where the mix of row sizes is another one than before."""
    shift = shape_shift(block, normal)
    return replace(normal, shapes=shapes_of(block)) if shift is not None and shift > SHAPES_LIMIT else None


def cost_ratio(block: Block, normal: Normal) -> float | None:
    """CPU time per row over its normal, over all buckets that both know, weighted by rows; None where too few calls compare."""
    weighted = rows = 0.0
    calls = 0
    for bucket, cost in block.costs_by_size().items():
        usual, median = normal.costs.get(bucket), cost.cpu.quantile(0.5)
        if usual and median is not None:
            weighted += cost.rows * median / usual
            rows += cost.rows
            calls += cost.calls
    return weighted / rows if calls >= LEAST_CALLS else None
