"""Who proposes the next candidate: aging evolution and REINFORCE. A candidate is one option of each decision; its reward comes back.

Knows neither networks nor training, only how many options each decision has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Choice = tuple[int, ...]
"""One option of each decision; 0 leaves the parent as it is."""
Merit = tuple[float, float]
"""Reward, and what settles ties."""
BASELINE_DECAY: Final = 0.8
NOVEL_TRIES: Final = 20
MOST_SCATTERED: Final = 0.5


class Strategy(Protocol):
    def propose(self) -> Choice: ...

    def learn(self, choice: Choice, merit: Merit) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class Evolution:
    """Regularized evolution (Real et al. 2019, arXiv:1802.01548): the best of a random `tournament` has a child, and the oldest dies."""

    def __init__(self, sizes: Sequence[int], population: int, tournament: int, random: np.random.Generator) -> None:
        self._sizes, self._tournament, self._random = tuple(sizes), tournament, random
        self.alive: deque[tuple[Choice, Merit]] = deque(maxlen=population)
        self._seen: set[Choice] = {(0,) * len(sizes)}

    def propose(self) -> Choice:
        """A random candidate until the population is full, then a mutated one; where that is possible, one not seen before."""
        for _ in range(NOVEL_TRIES):
            choice = self._scattered() if len(self.alive) < (self.alive.maxlen or 0) else self._mutated(self._selected())
            if choice not in self._seen:
                break
        self._seen.add(choice)
        return choice

    def learn(self, choice: Choice, merit: Merit) -> None:
        self.alive.append((choice, merit))  # a full deque drops its oldest

    def facts(self) -> dict[str, Any]:
        return {"population": [list(choice) for choice, _ in self.alive]}

    def _scattered(self) -> Choice:
        """Up to half of the decisions taken at random: light and heavy candidates alike."""
        share = self._random.uniform(0, MOST_SCATTERED)
        return tuple(int(self._random.integers(size)) if self._random.uniform() < share else 0 for size in self._sizes)

    def _selected(self) -> Choice:
        drawn = self._random.choice(len(self.alive), self._tournament, replace=False)
        return max((self.alive[int(i)] for i in drawn), key=lambda one: one[1])[0]

    def _mutated(self, parent: Choice) -> Choice:
        at = int(self._random.integers(len(parent)))
        other = (parent[at] + int(self._random.integers(1, self._sizes[at]))) % self._sizes[at]
        return (*parent[:at], other, *parent[at + 1 :])


class Reinforce:
    """REINFORCE (Zoph and Le 2017, arXiv:1611.01578) over one softmax per decision: θ ← θ + rate · (R − b) · ∇ log π(choice), b a moving average."""

    def __init__(self, sizes: Sequence[int], rate: float, random: np.random.Generator) -> None:
        self._rate, self._random = rate, random
        self._logits: list[NDArray[Any]] = [np.zeros(size) for size in sizes]
        self._baseline: float | None = None

    @property
    def policy(self) -> list[NDArray[Any]]:
        """Probabilities of each decision's options."""
        powers = [np.exp(logits - logits.max()) for logits in self._logits]
        return [power / power.sum() for power in powers]

    def propose(self) -> Choice:
        return tuple(int(self._random.choice(len(chances), p=chances)) for chances in self.policy)

    def learn(self, choice: Choice, merit: Merit) -> None:
        reward = merit[0]
        before = reward if self._baseline is None else self._baseline
        for logits, chances, taken in zip(self._logits, self.policy, choice, strict=True):
            gradient = -chances
            gradient[taken] += 1
            logits += self._rate * (reward - before) * gradient
        self._baseline = BASELINE_DECAY * before + (1 - BASELINE_DECAY) * reward

    def facts(self) -> dict[str, Any]:
        return {"policy": [[round(float(p), 4) for p in chances] for chances in self.policy], "baseline": self._baseline}
