"""Post-training int8: static (QDQ, calibrated ranges) and dynamic (ranges found while running). Configs, and which models they apply to.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.qdq and optimizers.dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, Outlook, method
from optimizers.host import host_class, parse_target
from optimizers.samples import Samples

Calibrator: TypeAlias = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
Switch: TypeAlias = Literal["auto", "on", "off"]
CALIBRATIONS: Final = get_args(Calibrator)
SWITCH: Final = get_args(Switch)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


@dataclass(frozen=True)
class Int8StaticConfig(Config):
    """Weights s8, activations u8, ranges from samples: x̂ = (q − z)·s with s = (max − min)/255 and per-channel weight scales.

    `reduce_range` auto: 7-bit weights where the host (or the budget's target) has no VNNI, whose kernels otherwise clip in silence.
    `keep_float`: so many layers stay in float, those whose quantization alone changes the outputs most. `exclude`: nodes by name.
    `equalize`: ranges of layers in a row are evened out first; `bias_correction`: biases take back the mean error of rounded weights;
    `smooth`: above 0, the share α of the activations' range that goes to the weights of linear layers (SmoothQuant).
    """

    method: ClassVar[str] = "int8-static"
    summary: ClassVar[str] = "8-bit weights and activations with ranges calibrated on samples (QDQ)"
    outlook: ClassVar[Outlook] = Outlook(1.5, 40.0, int8=True)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.CALIBRATION})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "calibration": CALIBRATIONS, "per_channel": (True, False), "reduce_range": ("on", "off"), "keep_float": (0, 1, 2, 4),
        "equalize": (False, True), "bias_correction": (False, True), "smooth": (0.0, 0.5, 0.75),
    }  # fmt: skip

    calibration: Calibrator = "minmax"
    percentile: float = 99.99
    averaging: float = 0.05
    samples: int = 512
    per_channel: bool = True
    reduce_range: Switch = "auto"
    symmetric: bool = False
    exclude: tuple[str, ...] = ()
    keep_float: int = 0
    equalize: bool = False
    bias_correction: bool = False
    smooth: float = 0.0

    def __post_init__(self) -> None:
        _one_of("calibration", self.calibration, CALIBRATIONS)
        _one_of("reduce_range", self.reduce_range, SWITCH)
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, not {self.percentile}")
        if not 0 < self.averaging <= 1:
            raise ValueError(f"averaging must be above 0 and at most 1, not {self.averaging}")
        if self.samples < 1 or self.keep_float < 0:
            raise ValueError(f"samples must be at least 1 and keep_float at least 0, not {self.samples} and {self.keep_float}")
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth must be from 0 to 1, not {self.smooth}")


@dataclass(frozen=True)
class Int8DynamicConfig(Config):
    """Weights of linear layers s8, activations u8 with the range of each call. Its rows are not independent: requests are not joined."""

    method: ClassVar[str] = "int8-dynamic"
    summary: ClassVar[str] = "8-bit weights of linear layers, activations quantized while running; no samples needed"
    outlook: ClassVar[Outlook] = Outlook(1.3, 30.0, int8=True)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"per_channel": (True, False), "reduce_range": ("on", "off")}

    per_channel: bool = True
    reduce_range: Switch = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("reduce_range", self.reduce_range, SWITCH)


@dataclass(frozen=True)
class Form:
    """The form of int8 that the kernels of a host class compute rightly (shared facts, hosts)."""

    reduce_range: bool
    signed_activations: bool
    target: str
    here: bool
    """False: built for another class, and so unproven there."""
    wide_activations: bool = False
    """16 bits instead of 8."""


def form_for(target: str, reduce_range: Switch) -> Form:
    """`target` is a host class key or short name (`avx2`), empty for this host."""
    host = host_class()
    wanted = parse_target(target) if target else host
    reduce = wanted.int8_saturates if reduce_range == "auto" else reduce_range == "on"
    return Form(reduce, wanted.arch == "aarch64", wanted.key, (wanted.arch, wanted.isa) == (host.arch, host.isa))


@method(Int8StaticConfig)
def int8_static(artifact: Artifact, config: Int8StaticConfig, samples: Samples, budget: Budget) -> Artifact:
    """Quantize statically. Raises NotApplicable: already quantized, nothing to quantize, no samples."""
    from optimizers.qdq import build

    return build(artifact, config, form_for(budget.target, config.reduce_range), samples, budget)


@method(Int8DynamicConfig)
def int8_dynamic(artifact: Artifact, config: Int8DynamicConfig, samples: Samples, budget: Budget) -> Artifact:
    """Quantize linear layers dynamically. Raises NotApplicable: already quantized, or mostly convolutions."""
    from optimizers.dynamic import build

    return build(artifact, config, form_for(budget.target, config.reduce_range), samples, budget)
