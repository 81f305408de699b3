"""Head pruning: attention heads that matter least removed for real, then fine-tuned. Config; the work is in optimizers.heads.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optimizers.artifact import Artifact
from optimizers.base import Budget, Gain, Outlook, method
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class HeadPruningConfig(TrainingConfig):
    """`ratio` of all attention heads goes: those of least I_h = E |∂L / ∂ξ_h|, ξ_h a gate at the head's output (Michel et al. 2019).

    The importances of a layer are scaled to length 1; each layer keeps `least` heads. `rows` rows are looked at. `keep`: modules left alone, by name.
    """

    method: ClassVar[str] = "head-pruning"
    summary: ClassVar[str] = "Attention heads that matter least removed from transformers, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(1.2, 900.0)
    then: ClassVar[tuple[str, ...]] = ("distill", "int8-static")
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"ratio": (0.25, 0.5)}

    ratio: float = 0.25
    least: int = 1
    rows: int = 256
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1 or self.least < 1 or self.rows < 2:
            raise ValueError(f"ratio must lie between 0 and 1, least be at least 1, rows 2, not {self.ratio}, {self.least} and {self.rows}")


@method(HeadPruningConfig)
def head_pruning(artifact: Artifact, config: HeadPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with fewer heads. Raises NotApplicable: no source, or no attention whose heads can be told apart, with the reasons."""
    from optimizers.heads import build

    return build(artifact, config, samples, budget)
