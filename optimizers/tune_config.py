"""Tune as a step that a recipe may name. It gives settings and no file, so it ends a recipe; where the model is served, optimizers.tune does it.

Importable without ONNX Runtime, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, NotApplicable, Outlook, method
from optimizers.samples import Samples

OBJECTIVES: Final = ("latency", "throughput")


@dataclass(frozen=True)
class TuneConfig(Config):
    """`objective`: latency (a single caller at low load), throughput (saturation), or '' for the model's own. `cores`: 0 for all that may be used."""

    method: ClassVar[str] = "tune"
    summary: ClassVar[str] = "Threads, instances, spinning and batch limit measured on the host that serves; answers stay the same"
    outlook: ClassVar[Outlook] = Outlook(1.2, 40.0)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.HERE})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.FASTER})
    lossless: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"objective": OBJECTIVES}

    objective: Literal["", "latency", "throughput"] = ""
    max_seconds: float = 30.0
    cores: int = 0

    def __post_init__(self) -> None:
        if self.objective not in {"", *OBJECTIVES}:
            raise ValueError(f"objective {self.objective!r} is unknown; name latency or throughput")
        if self.max_seconds <= 0 or self.cores < 0:
            raise ValueError(f"max_seconds must be above 0 and cores at least 0, not {self.max_seconds} and {self.cores}")

    @property
    def goal(self) -> str:
        return self.objective or OBJECTIVES[0]


@method(TuneConfig)
def tune(artifact: Artifact, config: TuneConfig, samples: Samples, budget: Budget) -> Artifact:
    """Never builds a file: raises NotApplicable, saying where tuning happens."""
    raise NotApplicable(
        "tune gives settings, not a file: it runs where the model is served (optimizers.tune), after the last step that builds"
    )
