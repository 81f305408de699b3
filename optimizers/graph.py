"""Offline graph optimization: ONNX Runtime's levels and transformer fusions baked into the file, chosen by measuring on this host.

Importable without ONNX Runtime, since the server reads the catalogue: the work is in optimizers.graph_levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Outlook, method
from optimizers.samples import Samples

Level: TypeAlias = Literal["auto", "basic", "extended", "all"]
LEVELS: Final = get_args(Level)


@dataclass(frozen=True)
class GraphConfig(Config):
    """`level` auto: every level is built, held to the unoptimized answers and timed against the file as it is served; the best is kept.

    A named level is built whatever it gains. 'all' chooses layouts for this class of host. `fusions`: transformer blocks as one operator.
    """

    method: ClassVar[str] = "graph"
    summary: ClassVar[str] = "ONNX Runtime's graph optimizations and transformer fusions, the fastest level on this host"
    outlook: ClassVar[Outlook] = Outlook(1.02, 25.0)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.FEWER_OPERATIONS, Gain.FASTER})
    lossless: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"level": LEVELS, "fusions": (True, False)}

    level: Level = "auto"
    fusions: bool = True
    least_gain: float = 0.02

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {self.level!r}")
        if not 0 <= self.least_gain < 1:
            raise ValueError(f"least_gain must be at least 0 and below 1, not {self.least_gain}")


@method(GraphConfig)
def graph(artifact: Artifact, config: GraphConfig, samples: Samples, budget: Budget) -> Artifact:
    """The file with its graph optimized. Raises NotApplicable: nothing changes, no level gains, or none keeps the answers."""
    from optimizers.graph_levels import build

    return build(artifact, config, samples, budget)
