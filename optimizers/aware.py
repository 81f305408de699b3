"""Accuracy-aware int8: the few layers that cost most stay float, until agreement on samples that calibrated nothing holds. Config.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.aware_search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, Outlook, method
from optimizers.int8 import Calibrator, Int8StaticConfig, Switch, form_for
from optimizers.samples import Samples


@dataclass(frozen=True)
class Int8AwareConfig(Config):
    """int8-static with as few float layers as it takes: agreement with the parent on `held_out` of the samples must reach `floor`.

    Layers are kept float in the order of what each alone does to the outputs, at most `most`; those not needed after all become int8 again.
    """

    method: ClassVar[str] = "int8-aware"
    summary: ClassVar[str] = "int8 that keeps the most sensitive layers in float until agreement on held-out samples holds"
    outlook: ClassVar[Outlook] = Outlook(1.4, 90.0, int8=True)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.CALIBRATION})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FASTER, Gain.LESS_MEMORY})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"floor": (0.98, 0.99, 0.995), "most": (2, 4, 8)}

    floor: float = 0.99
    most: int = 4
    held_out: float = 0.4
    calibration: Calibrator = "minmax"
    samples: int = 1024
    per_channel: bool = True
    reduce_range: Switch = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1 or not 0 < self.held_out < 1 or self.most < 0:
            raise ValueError(
                "floor must be above 0 and at most 1, held_out between 0 and 1, most at least 0, "
                f"not {self.floor}, {self.held_out} and {self.most}"
            )
        self.int8()

    def int8(self) -> Int8StaticConfig:
        """The same without the search. Raises ValueError for what int8-static refuses."""
        return Int8StaticConfig(
            calibration=self.calibration, samples=self.samples, per_channel=self.per_channel, reduce_range=self.reduce_range, exclude=self.exclude
        )  # fmt: skip


@method(Int8AwareConfig)
def int8_aware(artifact: Artifact, config: Int8AwareConfig, samples: Samples, budget: Budget) -> Artifact:
    """Quantize all but what must stay float. Raises NotApplicable: as int8-static, too few samples, or the floor is out of reach."""
    from optimizers.aware_search import build

    return build(artifact, config, form_for(budget.target, config.reduce_range), samples, budget)
