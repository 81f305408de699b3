"""Low rank: layers split in two on the ONNX graph itself, convolutions split in other ways in PyTorch. Configs.

Importable without ONNX Runtime and torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Outlook, method
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class LowRankConfig(Config):
    """W ≈ U_r Σ_r V_rᵀ, two thin layers for one, convolutions as the matrices [i·k², o] too. How ranks are chosen (`rank`):

    energy: the least with Σ_{i≤r} σ_i² ≥ `energy` · Σ σ_i² (Eckart and Young 1936); speed: the largest at which the two layers are timed `speed` ×
    as fast here as the one; sensitivity: each layer is split alone at several ranks, judged by the change of the model's outputs on `judged`
    samples, and `ratio` of these layers' multiply-adds goes where that changes them least. `split` faster: only layers whose two are timed faster
    here than the one, at `rows` rows; fewer: wherever r(k + n) < kn.
    """

    method: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "Linear layers and convolutions as two thin ones by truncated SVD, on the ONNX file alone"
    outlook: ClassVar[Outlook] = Outlook(1.2, 120.0)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "rank": ("energy", "speed", "sensitivity"),
        "energy": (0.8, 0.9, 0.95, 0.99),
        "split": ("faster", "fewer"),
    }

    rank: Literal["energy", "speed", "sensitivity"] = "energy"
    energy: float = 0.95
    speed: float = 1.5
    ratio: float = 0.2
    judged: int = 64
    split: Literal["faster", "fewer"] = "faster"
    rows: int = 8
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1 or not 0 < self.ratio < 1:
            raise ValueError(f"energy and ratio must be above 0 and below 1, not {self.energy} and {self.ratio}")
        if self.rank not in {"energy", "speed", "sensitivity"}:
            raise ValueError(f"rank must be energy, speed or sensitivity, not {self.rank!r}")
        if self.speed <= 1 or self.judged < 1:
            raise ValueError(f"speed must be above 1, judged at least 1, not {self.speed} and {self.judged}")
        if self.split not in {"faster", "fewer"}:
            raise ValueError(f"split must be faster or fewer, not {self.split!r}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, not {self.rows}")


@dataclass(frozen=True)
class SplitConfig(TrainingConfig):
    """What all methods share that split convolutions. How ranks are chosen (`rank`), layer by layer:

    energy: the least that keep this share of the kernel's energy; vbmf: what stands above the noise (Nakajima et al. 2013); sensitivity:
    each layer is split alone at several ranks and judged on `rows` rows held out, and `ratio` of all multiply-adds goes where that costs least.
    `least_saved`: a layer is split only where this share of its multiply-adds goes. `exclude`: modules left alone, by name.
    `linear`: linear layers are split too, each into two by truncated SVD, ranks by the same rule.
    """

    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"energy": (0.7, 0.8, 0.9), "rank": ("energy", "vbmf", "sensitivity")}

    energy: float = 0.8
    rank: Literal["energy", "vbmf", "sensitivity"] = "energy"
    ratio: float = 0.4
    rows: int = 128
    least_saved: float = 0.2
    exclude: tuple[str, ...] = ()
    linear: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy < 1 or not 0 < self.ratio < 1 or not 0 <= self.least_saved < 1:
            raise ValueError(
                "energy and ratio must be above 0 and below 1, least_saved at least 0 and below 1, "
                f"not {self.energy}, {self.ratio} and {self.least_saved}"
            )
        if self.rank not in {"energy", "vbmf", "sensitivity"} or self.rows < 2:
            raise ValueError(f"rank must be energy, vbmf or sensitivity, rows at least 2, not {self.rank!r} and {self.rows}")


@dataclass(frozen=True)
class TuckerConfig(SplitConfig):
    """A k×k convolution as 1×1, k×k, 1×1: W ≈ G ×₁ U_out ×₂ U_in (Kim et al. 2016), ranks by the unfoldings along both; then fine-tuned."""

    method: ClassVar[str] = "tucker"
    summary: ClassVar[str] = "Convolutions as three smaller ones by Tucker-2 decomposition, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(2.0, 1800.0)
    then: ClassVar[tuple[str, ...]] = ("int8-static",)


@method(LowRankConfig)
def low_rank(artifact: Artifact, config: LowRankConfig, samples: Samples, budget: Budget) -> Artifact:
    """The file with linear layers split. Raises NotApplicable: none to split, or none that is better off split, with what was measured."""
    from optimizers.svd import build

    return build(artifact, config, samples, budget)


@method(TuckerConfig)
def tucker(artifact: Artifact, config: TuckerConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with convolutions split. Raises NotApplicable: no source, or no convolution that is better off split."""
    from optimizers.matrices import Either
    from optimizers.splitting import build
    from optimizers.tucker import Tucker

    return build(artifact, config, Either(Tucker()), samples, budget)
