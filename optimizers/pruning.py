"""Structured pruning: whole channels and neurons removed from a PyTorch module, then fine-tuned. Configs; the work is in optimizers.channels.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, Outlook, method
from optimizers.samples import Samples

Importance: TypeAlias = Literal["l1", "l2", "taylor", "bn-scale"]
IMPORTANCES: Final = get_args(Importance)


@dataclass(frozen=True)
class TrainingConfig(Config):
    """What every method that fine-tunes shares. `minutes` bounds the training, whatever `epochs` says; 0 epochs: none.

    `alpha` weighs golden's soft answers (temperature `temperature`) against true labels, where there are any. `augment`: images are moved and
    made a little noisy; `mirror`: half of them are mirrored, for images that mean the same then.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.SOURCE, Need.TRAINING})
    extra: ClassVar[str] = "optimize"

    epochs: int = 30
    minutes: float = 10.0
    rate: float = 1e-3
    batch: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    patience: int = 10
    temperature: float = 2.0
    alpha: float = 0.7
    augment: bool = True
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.minutes <= 0 or self.rate <= 0 or self.batch < 2 or self.patience < 1:
            raise ValueError("epochs must be at least 0, minutes and rate above 0, batch at least 2 and patience at least 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay:g}")
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError(f"temperature must be above 0 and alpha from 0 to 1, not {self.temperature} and {self.alpha}")
        if self.optimizer not in {"adamw", "sgd"}:
            raise ValueError(f"optimizer must be adamw or sgd, not {self.optimizer!r}")


@dataclass(frozen=True)
class StructuredPruningConfig(TrainingConfig):
    """`ratio` of the channels goes, ranked over the whole model (`scope` global) or within each layer, in `steps` with fine-tuning after each.

    `importance`: l1 | l2 (size of the weights), taylor (|w · ∂L/∂w|, Molchanov et al. 2019), bn-scale (|γ|, Liu et al. 2017).
    `round_to`: channels that stay are a multiple of this. `most`: no layer loses more than this share. `keep`: modules left alone, by name.
    """

    method: ClassVar[str] = "structured-pruning"
    summary: ClassVar[str] = "Whole channels and neurons removed, dependencies through residuals and concatenations solved, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(1.8, 900.0)
    then: ClassVar[tuple[str, ...]] = ("distill", "int8-static")
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "ratio": (0.2, 0.3, 0.4, 0.5), "importance": IMPORTANCES, "scope": ("global", "layer"), "steps": (1, 3),
    }  # fmt: skip

    ratio: float = 0.3
    importance: Importance = "l2"
    scope: Literal["global", "layer"] = "layer"
    steps: int = 1
    round_to: int = 8
    most: float = 0.8
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1 or not 0 < self.most < 1:
            raise ValueError(f"ratio and most must be above 0 and below 1, not {self.ratio} and {self.most}")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance must be one of {', '.join(IMPORTANCES)}, not {self.importance!r}")
        if self.scope not in {"global", "layer"}:
            raise ValueError(f"scope must be global or layer, not {self.scope!r}")
        if self.steps < 1 or self.round_to < 1:
            raise ValueError(f"steps and round_to must be at least 1, not {self.steps} and {self.round_to}")


@method(StructuredPruningConfig)
def structured_pruning(artifact: Artifact, config: StructuredPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with fewer channels. Raises NotApplicable: no source, nothing to remove, or a module whose forward does not bear it."""
    from optimizers.channels import build

    return build(artifact, config, samples, budget)
