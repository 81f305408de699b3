"""Quantization-aware training: the model learns with 8-bit rounding in its way. Config; the work is in optimizers.rehearsal.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optimizers.artifact import Artifact
from optimizers.base import Budget, Gain, Outlook, method
from optimizers.int8 import Int8StaticConfig, Switch, form_for
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class QatConfig(TrainingConfig):
    """x̂ = (clamp(round(x/s) + z) − z)·s for the weights and inputs of each layer in every forward pass; rounding passes gradients through.

    `learn_steps`: s is trained too, as s₀·exp(t) (LSQ, Esser et al. 2020; in the log domain as Jain et al. 2020), from s₀ = (max − min)/255
    over `rows` rows; without it s stays s₀. `per_channel`, `reduce_range`, `exclude` (nodes of the exported file) as in int8-static.
    """

    method: ClassVar[str] = "qat"
    summary: ClassVar[str] = "Trained with 8-bit weights and activations simulated and step sizes learned, served as int8 (QDQ)"
    outlook: ClassVar[Outlook] = Outlook(1.4, 900.0, int8=True)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "rate": (1e-5, 1e-4, 1e-3), "learn_steps": (True, False), "per_channel": (True, False), "alpha": (0.5, 0.7, 1.0),
    }  # fmt: skip

    rate: float = 1e-4
    learn_steps: bool = True
    rows: int = 256
    per_channel: bool = True
    reduce_range: Switch = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1: without training this is int8-static")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows}")
        self.int8()

    def int8(self) -> Int8StaticConfig:
        """How the trained model becomes int8. Raises ValueError for what int8-static refuses."""
        return Int8StaticConfig(samples=self.rows, per_channel=self.per_channel, reduce_range=self.reduce_range, exclude=self.exclude)


@method(QatConfig)
def qat(artifact: Artifact, config: QatConfig, samples: Samples, budget: Budget) -> Artifact:
    """The trained model in int8. Raises NotApplicable: no source, no layer to quantize, or normalizations that do not fold."""
    from optimizers.rehearsal import build

    return build(artifact, config, form_for(budget.target, config.reduce_range), samples, budget)
