"""One choice for each layer under a budget: least Σ loss with Σ cost ≤ budget (the multiple-choice knapsack). Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

UNITS: Final = 20_000
"""The exact program counts costs in 1/UNITS of the budget, rounded up."""


@dataclass(frozen=True)
class Choice:
    """What a layer may become: `cost` in bytes or operations, `loss` what it adds to the error of the outputs."""

    name: str
    cost: int
    loss: float


Table = Mapping[str, Sequence[Choice]]
Chosen = dict[str, Choice]


class TooTight(ValueError):
    """Even the cheapest choices cost more than the budget."""


def allot(table: Table, budget: int, how: str) -> Chosen:
    """`how`: greedy, or exact (dynamic programming; never worse than greedy). Raises TooTight."""
    cheapest = sum(min(choice.cost for choice in choices) for choices in table.values())
    if cheapest > budget:
        raise TooTight(f"the cheapest choices cost {cheapest} and the budget is {budget}")
    quick = greedy(table, budget)
    if how == "greedy":
        return quick
    slow = exact(table, budget)
    return quick if slow is None or total_loss(quick) < total_loss(slow) else slow


def total_loss(chosen: Chosen) -> float:
    return sum(choice.loss for choice in chosen.values())


def greedy(table: Table, budget: int) -> Chosen:
    """From the cheapest on: always the change that takes away most loss per cost, while it fits."""
    chosen = {layer: min(choices, key=lambda c: (c.cost, c.loss)) for layer, choices in table.items()}
    left = budget - sum(choice.cost for choice in chosen.values())
    while True:
        steps = [
            ((now.loss - better.loss) / max(better.cost - now.cost, 1), layer, better)
            for layer, now in chosen.items()
            for better in table[layer]
            if better.loss < now.loss and better.cost - now.cost <= left
        ]
        if not steps:
            return chosen
        _, layer, better = max(steps, key=lambda step: step[0])
        left -= better.cost - chosen[layer].cost
        chosen[layer] = better


def exact(table: Table, budget: int) -> Chosen | None:
    """By dynamic programming over the budget, in units; None where rounding up leaves no room."""
    unit = max(math.gcd(*(choice.cost for choices in table.values() for choice in choices)), -(-budget // UNITS), 1)
    room = budget // unit
    least = np.zeros(room + 1)
    taken: list[NDArray[Any]] = []
    for choices in table.values():
        sums = np.full((len(choices), room + 1), np.inf)
        for row, choice in enumerate(choices):
            cost = -(-choice.cost // unit)
            if cost <= room:
                sums[row, cost:] = least[: room + 1 - cost] + choice.loss
        taken.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    if not np.isfinite(least[room]):
        return None
    chosen: Chosen = {}
    for (layer, choices), best in zip(reversed(list(table.items())), reversed(taken), strict=True):
        chosen[layer] = choices[int(best[room])]
        room -= -(-chosen[layer].cost // unit)
    return {layer: chosen[layer] for layer in table}
