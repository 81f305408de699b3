"""Architecture search: narrower, shallower, cheaper forms of the model's own network, found by evolution, reinforcement or gradients. Config.

Importable without torch, since the server reads the catalogue; the work is in optimizers.architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Gain, Outlook, method
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples

OPERATIONS = ("spatial", "depthwise", "tucker")


@dataclass(frozen=True)
class ArchitectureSearchConfig(TrainingConfig):
    """max reward = quality · min(1, target / cost)^`cost_weight` over widths, depth and kernels; the best is then trained to the end.

    `strategy`: evolution (aging, Real et al. 2019), reinforcement (REINFORCE, Zoph and Le 2017; reward of MnasNet), darts (Liu et al. 2019).
    Decisions: each group of channels loses one of `widths` or nothing, each residual block stays or is skipped (`depth`), each convolution
    stays or becomes one of `operations`. Every candidate inherits the parent's weights, is trained for `trial_epochs` on `trial_rows` rows and judged on rows held out.
    `cost`: multiply-adds, or time (CPU time of the exported file here); both as a share of the parent's, as `target` is.
    `trials` candidates, or as many as `search_minutes` allow; darts trains its one network for trials × trial_epochs.
    """

    method: ClassVar[str] = "architecture-search"
    summary: ClassVar[str] = (
        "Widths, depth and kernels of the network searched by evolution, reinforcement or gradients; the best is trained"
    )
    outlook: ClassVar[Outlook] = Outlook(1.5, 3600.0)
    then: ClassVar[tuple[str, ...]] = ("int8-static",)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "strategy": ("evolution", "reinforcement", "darts"), "target": (0.3, 0.5, 0.7),
    }  # fmt: skip

    strategy: Literal["evolution", "reinforcement", "darts"] = "evolution"
    target: float = 0.5
    cost: Literal["multiply-adds", "time"] = "multiply-adds"
    cost_weight: float = 1.0
    trials: int = 24
    trial_epochs: int = 1
    trial_rows: int = 1024
    search_minutes: float = 10.0
    population: int = 8
    tournament: int = 3
    policy_rate: float = 2.0
    widths: tuple[float, ...] = (0.25, 0.5)
    depth: bool = True
    operations: tuple[str, ...] = OPERATIONS
    energy: float = 0.6
    round_to: int = 8
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target < 1 or not 0 < self.energy < 1 or not all(0 < width < 1 for width in self.widths):
            raise ValueError(f"target, energy and widths must lie between 0 and 1, not {self.target}, {self.energy} and {self.widths}")
        if unknown := set(self.operations) - set(OPERATIONS):
            raise ValueError(f"operations are {', '.join(OPERATIONS)}, not {', '.join(sorted(unknown))}")
        if self.cost_weight < 0 or self.policy_rate < 0 or self.search_minutes <= 0:
            raise ValueError("cost_weight and policy_rate must be at least 0, search_minutes above 0")
        if min(self.trials, self.trial_epochs, self.round_to) < 1 or self.trial_rows < 16:
            raise ValueError("trials, trial_epochs and round_to must be at least 1, trial_rows at least 16")
        if not 1 <= self.tournament <= self.population:
            raise ValueError(f"tournament must be from 1 to population, not {self.tournament} of {self.population}")
        if self.strategy not in {"evolution", "reinforcement", "darts"} or self.cost not in {"multiply-adds", "time"}:
            raise ValueError(f"strategy {self.strategy!r} or cost {self.cost!r} is unknown")
        if self.strategy == "darts" and self.cost == "time":
            raise ValueError("darts follows the gradient of its cost, so its cost is multiply-adds; time is for the other strategies")


@method(ArchitectureSearchConfig)
def architecture_search(artifact: Artifact, config: ArchitectureSearchConfig, samples: Samples, budget: Budget) -> Artifact:
    """The best candidate, trained. Raises NotApplicable: no source, nothing to decide, or no candidate that is cheaper than the parent."""
    from optimizers.architecture import build

    return build(artifact, config, samples, budget)
