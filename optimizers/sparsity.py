"""Two more ways to decide which channels go: by measured sensitivity, and by training with an L1 term until channels are zero. Configs.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Gain, Outlook, method
from optimizers.pruning import StructuredPruningConfig, TrainingConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class SensitivityPruningConfig(StructuredPruningConfig):
    """`ratio` of the multiply-adds goes, taken where it costs least: each group of layers is cut alone at each of `levels`, and judged.

    `importance` ranks the channels inside a group. `rows`: so many rows held out judge each cut.
    """

    method: ClassVar[str] = "sensitivity-pruning"
    summary: ClassVar[str] = "Channels removed where cutting hurts least: ablation curves of every layer, ratios allotted under one budget"
    outlook: ClassVar[Outlook] = Outlook(1.6, 1200.0)
    then: ClassVar[tuple[str, ...]] = ("distill", "int8-static")
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"ratio": (0.3, 0.5, 0.7), "importance": ("l1", "l2", "taylor")}

    ratio: float = 0.5
    levels: tuple[float, ...] = (0.25, 0.5, 0.75)
    rows: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or list(self.levels) != sorted(self.levels) or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels must rise and lie between 0 and 1, not {self.levels}")
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2, not {self.rows}")


@dataclass(frozen=True)
class L1SparsityConfig(TrainingConfig):
    """min L(w) + λ Σ_c a_c ‖(γ_c, β_c)‖ over channels, by a proximal step after each update: γ ← γ · max(0, 1 − ηλa / ‖·‖), so zeros are zeros.

    `strength` is λ at first. It is raised while fewer channels are zero than would have to be by now for `ratio` of them to be in the end; from there
    on they are held at zero and nothing is shrunk any more. `reweighted`: a_c = mean length / length, so that what is small goes and what is
    large stays (Candès, Wakin and Boyd 2008, arXiv:0711.1612); else a_c = 1. Channels that layers share (residuals) count as one group; layers
    without BatchNorm use their filters instead of γ, β. A group of which `most` is zero is shrunk no further.
    What became zero is removed, which changes no answer; `recover` of the epochs then fine-tune what is left.
    `on` weights: min L(w) + λ Σ a|w| over the single weights of linear layers and convolutions instead. They stay where they are: only the packed
    file gets smaller.
    """

    method: ClassVar[str] = "l1-sparsity"
    summary: ClassVar[str] = "Trained with an L1 term until channels are exactly zero, and those removed; or single weights (on=weights)"
    outlook: ClassVar[Outlook] = Outlook(1.5, 1800.0)
    then: ClassVar[tuple[str, ...]] = ("distill", "int8-static")
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"ratio": (0.3, 0.5, 0.7)}

    on: Literal["channels", "weights"] = "channels"
    strength: float = 0.01
    ratio: float = 0.4
    reweighted: bool = True
    most: float = 0.75
    recover: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0 or not 0 <= self.recover < 1 or self.epochs < 1:
            raise ValueError(
                f"strength must be at least 0, recover at least 0 and below 1, epochs at least 1, not {self.strength}, {self.recover} and {self.epochs}"
            )
        if self.on not in {"channels", "weights"}:
            raise ValueError(f"on must be channels or weights, not {self.on!r}")
        if not 0 < self.ratio <= self.most < 1:
            raise ValueError(f"ratio and most must lie between 0 and 1, ratio not above most, not {self.ratio} and {self.most}")


@method(SensitivityPruningConfig)
def sensitivity_pruning(artifact: Artifact, config: SensitivityPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with channels removed where it hurts least; the curves are in the facts. Raises NotApplicable as structured-pruning does."""
    from optimizers.sensitivity import build

    return build(artifact, config, samples, budget)


@method(L1SparsityConfig)
def l1_sparsity(artifact: Artifact, config: L1SparsityConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model without the channels that training made zero. Raises NotApplicable where none became zero."""
    from optimizers.proximal import build

    return build(artifact, config, samples, budget)
