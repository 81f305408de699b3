"""4-bit linear layers: weights in blocks, each block with a scale (and a zero point) of its own. Config.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.int4_graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, Outlook, method
from optimizers.samples import Samples

BLOCKS: Final = (16, 32, 64, 128, 256)
COMPUTE: Final = {"float": 0, "int8": 4}
"""Accuracy level of com.microsoft.MatMulNBits: activations stay float, or become 8 bits block by block."""


@dataclass(frozen=True)
class Int4LinearConfig(Config):
    """ŵ = (q − z)·s for q in 0..15, s and z for each `block` of inputs of each output: s = (max − min)/15 (symmetric: z = 8, s = max|w|/7).

    `compute` float multiplies with float activations, int8 with activations of 8 bits per block (faster, and a little less exact).
    `least`: layers with fewer weights stay as they are.
    """

    method: ClassVar[str] = "int4-linear"
    summary: ClassVar[str] = "Linear layers with 4-bit weights in blocks (MatMulNBits); no samples needed"
    outlook: ClassVar[Outlook] = Outlook(1.0, 30.0)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"block": (32, 64, 128), "symmetric": (True, False), "compute": tuple(COMPUTE)}

    block: int = 32
    symmetric: bool = False
    compute: Literal["float", "int8"] = "float"
    least: int = 4096
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block not in BLOCKS or self.compute not in COMPUTE:
            raise ValueError(
                f"block must be one of {', '.join(map(str, BLOCKS))} and compute one of {', '.join(COMPUTE)}, not {self.block} and {self.compute!r}"
            )
        if self.least < 1:
            raise ValueError(f"least must be at least 1, not {self.least}")


@method(Int4LinearConfig)
def int4_linear(artifact: Artifact, config: Int4LinearConfig, samples: Samples, budget: Budget) -> Artifact:
    """Quantize linear layers to 4 bits. Raises NotApplicable: already quantized, or no linear layer large enough."""
    from optimizers.int4_graph import build

    return build(artifact, config, samples, budget)
