"""Non-uniform quantization of weights: each layer's weights share a few levels, stored once (the codebook), and an index each. Config.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.codebook_graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, method
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples
from optimizers.uniform import BITS

Levels: TypeAlias = Literal["kmeans", "entropy", "perceptual"]
Allotment: TypeAlias = Literal["equal", "greedy", "exact"]
LEVELS: Final = get_args(Levels)
ALLOTMENTS: Final = get_args(Allotment)


@dataclass(frozen=True)
class CodebookConfig(Config):
    """ŵ = c[k]: at most 2ᵇ levels c per layer. kmeans: min Σ (w − ŵ)². entropy: min D + λR. perceptual: min E(Wx − Ŵx)².

    `sparsity`: this share of the smallest weights of each layer is zero and stays so. `rate`: λ of entropy, 1 the slope of the rate curve.
    `allot`: perceptual only; bits per layer by measured sensitivity, `bits` on average, or equal. `layer_bits`: ((node, bits), …).
    """

    method: ClassVar[str] = "codebook"
    summary: ClassVar[str] = "Weights as indices into a few levels per layer: k-means, entropy-constrained or by their effect on outputs"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "levels": LEVELS, "bits": (3, 4, 5, 6, 8), "sparsity": (0.0, 0.3, 0.5), "allot": ALLOTMENTS,
    }  # fmt: skip

    levels: Levels = "kmeans"
    bits: int = 4
    layer_bits: tuple[tuple[str, int], ...] = ()
    sparsity: float = 0.0
    rate: float = 1.0
    allot: Allotment = "greedy"
    samples: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.levels not in LEVELS or self.allot not in ALLOTMENTS:
            raise ValueError(
                f"levels must be one of {', '.join(LEVELS)} and allot one of {', '.join(ALLOTMENTS)}, not {self.levels!r} and {self.allot!r}"
            )
        for bits in (self.bits, *(bits for _, bits in self.layer_bits)):
            if bits not in BITS:
                raise ValueError(f"bits must be from {BITS[0]} to {BITS[-1]}, not {bits}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, not {self.sparsity}")
        if self.rate < 0 or self.samples < 1:
            raise ValueError(f"rate must be at least 0 and samples at least 1, not {self.rate} and {self.samples}")


@method(CodebookConfig)
def codebook(artifact: Artifact, config: CodebookConfig, samples: Samples, budget: Budget) -> Artifact:
    """The file with codebooks in its graph. Raises NotApplicable: quantized already, no large weights, perceptual without samples."""
    from optimizers.codebook_graph import build

    return build(artifact, config, samples, budget)


@dataclass(frozen=True)
class TrainedCodebookConfig(TrainingConfig):
    """k-means levels that are trained with the weights' indices fixed: c_k ← c_k − η Σ_{i: kᵢ = k} ∂L/∂wᵢ (Han et al. 2016, section 3.2).

    `bits` and `sparsity` as in codebook (what is zero stays so); biases and normalizations learn, too.
    """

    method: ClassVar[str] = "trained-codebook"
    summary: ClassVar[str] = "Weights as indices into a few k-means levels per layer, and the levels trained (Deep Compression)"
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bits": (2, 3, 4, 5), "sparsity": (0.0, 0.3, 0.5), "rate": (1e-5, 1e-4, 1e-3)}

    rate: float = 1e-4
    bits: int = 4
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1: without training this is codebook")
        self.plain()

    def plain(self) -> CodebookConfig:
        """The form that the trained weights are stored in. Raises ValueError for what codebook refuses."""
        return CodebookConfig(bits=self.bits, sparsity=self.sparsity)


@method(TrainedCodebookConfig)
def trained_codebook(artifact: Artifact, config: TrainedCodebookConfig, samples: Samples, budget: Budget) -> Artifact:
    """The file with trained codebooks. Raises NotApplicable: no source, no large weights, or normalizations that do not fold."""
    from optimizers.centroids import build

    return build(artifact, config, samples, budget)
