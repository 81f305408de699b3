"""Settings of a model that is never idle: compared as they would be lived with, in fresh runners beside the traffic. It changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Final, Protocol

from app.domain import JSON, RuntimeSettings
from optimizers.samples import Samples

LEAST_GAIN: Final = 1.05
"""What a layout must gain, by its interval; among those within as much of the best the one that takes the fewest cores is as good."""
COMPARISON_S: Final = 3.0
MOST_S: Final = 60.0


class Plane(Protocol):
    """What is asked of the data plane."""

    async def newest(self, name: str) -> Sequence[Samples]: ...
    async def in_turns(
        self, name: str, settings: tuple[RuntimeSettings, RuntimeSettings], inputs: Samples, seconds: float, limit: float
    ) -> tuple[float, float, float] | None: ...


@dataclass(frozen=True, slots=True)
class Lived:
    """`speedup` (estimate, low, high): time of a call under the settings in use over that under these; None where too little was seen."""

    settings: RuntimeSettings
    speedup: tuple[float, float, float] | None

    def to_json(self) -> JSON:
        names = ("intra_op_threads", "instances", "spin_duration_us")
        return {name: getattr(self.settings, name) for name in names} | {"speedup": self.speedup}


async def lived_with(
    plane: Plane, name: str, used: RuntimeSettings, layouts: Sequence[RuntimeSettings], inputs: Samples, stopped: Callable[[], bool]
) -> list[Lived]:
    """Each layout beside the settings in use, as long as there is time. Raises what starting runners raises."""
    until = monotonic() + MOST_S
    found = []
    for layout in layouts:
        if stopped() or monotonic() > until:
            found.append(Lived(layout, None))
            continue
        ratio = await plane.in_turns(name, (layout, used), inputs, COMPARISON_S, LEAST_GAIN)
        found.append(Lived(layout, ratio))
    return found


def layouts_of(report: Mapping[str, Any], used: RuntimeSettings) -> list[RuntimeSettings]:
    """What a tuner that could not compare was to try."""
    tried = [
        replace(used, intra_op_threads=row["intra_op_threads"], instances=row["instances"], spin_duration_us=row["spin_duration_us"])
        for row in report.get("layouts") or ()
    ]
    return [layout for layout in dict.fromkeys(tried) if layout != used]


def concluded(report: Mapping[str, Any], used: RuntimeSettings, lived: Sequence[Lived]) -> JSON:
    """The tuner's report with what was seen beside the traffic, and the verdict that follows from it. Pure."""
    shown = [(one.speedup, one.settings) for one in lived if one.speedup is not None and one.speedup[1] >= LEAST_GAIN]
    told: JSON = {**report, "beside_traffic": [one.to_json() for one in lived]}
    if shown:
        best = max(speedup[0] for speedup, _ in shown)
        as_good = [(speedup, settings) for speedup, settings in shown if speedup[0] * LEAST_GAIN >= best]
        speedup, settings = min(as_good, key=lambda one: (one[1].intra_op_threads, one[1].spin_duration_us))
        reason = f"{speedup[0]:.2f} × as fast [{speedup[1]:.2f}, {speedup[2]:.2f}] in fresh runners beside the traffic"
        chosen = {name: getattr(settings, name) for name in ("intra_op_threads", "instances", "spin_duration_us")}
        told |= {"verdict": "tuned", "changed": True, "settings": chosen, "gain": speedup, "reason": reason}
    elif lived and all(one.speedup is not None for one in lived):
        told |= {
            "verdict": "kept",
            "changed": False,
            "reason": "no layout gains what is worth a change in fresh runners beside the traffic",
        }
    return told | {"summary": f"{told.get('verdict')}: {told.get('reason')}"}
