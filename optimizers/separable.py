"""Three more ways to split a convolution: into columns and rows, into four by CP, into one filter per channel and a mix of them. Configs.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optimizers.artifact import Artifact
from optimizers.base import Budget, Outlook, method
from optimizers.low_rank import SplitConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class SpatialConfig(SplitConfig):
    """A k×k convolution as k×1 to r channels and 1×k: W[o, i, y, x] ≈ Σ_r H[o, r, x] V[r, i, y] by SVD (Jaderberg et al. 2014); then fine-tuned."""

    method: ClassVar[str] = "spatial"
    summary: ClassVar[str] = "Convolutions as a column and a row of weights (k×1, 1×k) by SVD, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(2.0, 1800.0)
    then: ClassVar[tuple[str, ...]] = ("int8-static",)


@dataclass(frozen=True)
class CpConfig(SplitConfig):
    """A k×k convolution as 1×1, k×1 and 1×k per channel, 1×1: W ≈ Σ_r a_r ∘ b_r ∘ c_r ∘ d_r by CP (Lebedev et al. 2015); then fine-tuned.

    Its kernel keeps less energy than others' at equal ranks, so it wants training. Ranks by energy: the least tried whose squared error is 1 − energy.
    """

    method: ClassVar[str] = "cp"
    summary: ClassVar[str] = "Convolutions as four thin ones by CP decomposition, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(2.0, 2400.0)
    then: ClassVar[tuple[str, ...]] = ("int8-static",)

    energy: float = 0.6


@dataclass(frozen=True)
class DepthwiseConfig(SplitConfig):
    """A k×k convolution as T filters for each input channel and 1×1: W[:, i] ≈ Σ_t p_ti ∘ d_ti by SVD (Guo et al. 2018); then fine-tuned.

    T, the same for all channels, is what `rank` chooses: by energy or sensitivity.
    """

    method: ClassVar[str] = "depthwise"
    summary: ClassVar[str] = "Convolutions as depthwise and pointwise ones by SVD of each channel, then fine-tuned"
    outlook: ClassVar[Outlook] = Outlook(2.5, 2400.0)
    then: ClassVar[tuple[str, ...]] = ("int8-static",)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"energy": (0.4, 0.6, 0.8), "rank": ("energy", "sensitivity")}

    energy: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank == "vbmf":
            raise ValueError("rank must be energy or sensitivity: vbmf wants one large matrix, and here is a small one for each channel")


@method(SpatialConfig)
def spatial(artifact: Artifact, config: SpatialConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with convolutions split in two. Raises NotApplicable: no source, or no convolution that is better off split."""
    from optimizers.kernels import Spatial
    from optimizers.matrices import Either
    from optimizers.splitting import build

    return build(artifact, config, Either(Spatial()), samples, budget)


@method(CpConfig)
def cp(artifact: Artifact, config: CpConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with convolutions split in four. Raises NotApplicable: no source, or no convolution that is better off split."""
    from optimizers.kernels import Cp
    from optimizers.matrices import Either
    from optimizers.splitting import build

    return build(artifact, config, Either(Cp(budget.seed)), samples, budget)


@method(DepthwiseConfig)
def depthwise(artifact: Artifact, config: DepthwiseConfig, samples: Samples, budget: Budget) -> Artifact:
    """The model with convolutions made separable. Raises NotApplicable: no source, or no convolution that is better off split."""
    from optimizers.kernels import Depthwise
    from optimizers.matrices import Either
    from optimizers.splitting import build

    return build(artifact, config, Either(Depthwise()), samples, budget)
