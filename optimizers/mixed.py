"""Mixed precision: 16-bit activations, 16-bit linear layers beside int8 convolutions, or the precision of each layer by measured loss. Config.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.mixed_graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, Outlook, method
from optimizers.int8 import CALIBRATIONS, Calibrator
from optimizers.samples import Samples

Form: TypeAlias = Literal["w8a16", "conv8-linear16", "sensitivity"]
Precision: TypeAlias = Literal["int4", "int8", "float16", "float32"]
Count: TypeAlias = Literal["bytes", "operations", "time"]
Allotment: TypeAlias = Literal["greedy", "exact"]
FORMS: Final = get_args(Form)
PRECISIONS: Final = get_args(Precision)
COUNTS: Final = get_args(Count)
ALLOTMENTS: Final = get_args(Allotment)


@dataclass(frozen=True)
class MixedPrecisionConfig(Config):
    """`form` w8a16: 8-bit weights, 16-bit activations. conv8-linear16: int8 convolutions, float16 weights of linear layers.

    sensitivity: each layer gets one of `precisions` so that Σ (error of the outputs when it alone is so)² is least while all layers together
    cost at most `share` of what they cost in float32, counted in `count`: bytes of weights, bit operations, or time, each layer's in float32
    and in int8 measured here at batch 1 (other precisions are computed in float32); allotted greedily or exactly.
    """

    method: ClassVar[str] = "mixed-precision"
    summary: ClassVar[str] = "Several precisions in one model: 16-bit activations, 16-bit linear layers, or by each layer's sensitivity"
    outlook: ClassVar[Outlook] = Outlook(1.2, 120.0)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.CALIBRATION})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FASTER})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "form": FORMS, "share": (0.15, 0.2, 0.25, 0.3, 0.4), "count": COUNTS, "allot": ALLOTMENTS,
    }  # fmt: skip

    form: Form = "sensitivity"
    precisions: tuple[Precision, ...] = PRECISIONS
    share: float = 0.3
    count: Count = "bytes"
    allot: Allotment = "greedy"
    calibration: Calibrator = "minmax"
    samples: int = 512
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("form", self.form, FORMS),
            ("count", self.count, COUNTS),
            ("allot", self.allot, ALLOTMENTS),
            ("calibration", self.calibration, CALIBRATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if self.form == "w8a16" and self.calibration in {"entropy", "mse"}:
            raise ValueError(
                f"calibration {self.calibration} counts 256 levels, which w8a16 has not: take minmax, moving_average or percentile"
            )
        if not self.precisions or set(self.precisions) - set(PRECISIONS):
            raise ValueError(f"precisions must be some of {', '.join(PRECISIONS)}, not {', '.join(self.precisions) or 'none'}")
        if not 0 < self.share <= 1 or self.samples < 1:
            raise ValueError(f"share must be above 0 and at most 1, samples at least 1, not {self.share} and {self.samples}")


@method(MixedPrecisionConfig)
def mixed_precision(artifact: Artifact, config: MixedPrecisionConfig, samples: Samples, budget: Budget) -> Artifact:
    """The file in mixed precision. Raises NotApplicable: quantized already, no layers of the kinds it mixes, a share too small."""
    from optimizers.mixed_graph import build

    return build(artifact, config, samples, budget)
