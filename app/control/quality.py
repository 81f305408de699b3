"""What live answers beside golden's say of a version without labels: classes on which it is another model, and whether it became less (or more) sure.

Pure. Least counts and effect sizes decide, never a p-value: with traffic enough any difference is significant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from app.catalog.model_config import ModelConfig
from app.telemetry.likeness import Likeness
from optimizers.fidelity import COLLAPSE
from optimizers.stats import wilson, z_for

LEAST_OF_CLASS: Final = 20
LEAST_MISSES: Final = 3
LEAST_PAIRS: Final = 100
EFFECT: Final = 0.5
"""Standard deviations of golden's own entropy or margin: a medium effect (Cohen 1988). int8 moved the demo's by 0.002 on inputs as calibrated, by 3 on inverted ones."""


@dataclass(frozen=True, slots=True)
class BelowFloor:
    """A class of golden's on which a version agrees with it too seldom."""

    group: int
    agreed: int
    compared: int
    floor: float

    @property
    def text(self) -> str:
        return f"agrees with golden on {self.agreed} of {self.compared} live rows of class {self.group} (floor {self.floor:.1%})"


def worst_class(likeness: Likeness, config: ModelConfig) -> BelowFloor | None:
    """The class that lies surest below its floor; the bound takes account of how many were tried (Bonferroni).

    Without `quality.per_class_floor` a class must have collapsed, as at the offline gate: five times the misses that the floor allows.
    """
    metric, floor = config.quality.resolved(config.task)
    if metric not in ("agreement", "accuracy"):
        return None
    own = config.quality.per_class_floor
    least = own if own is not None else 1 - COLLAPSE * (1 - floor)
    judged = [(group, *counts) for group, counts in likeness.groups.items() if counts[1] >= LEAST_OF_CLASS]
    z = z_for(len(judged))
    below = [
        (high, BelowFloor(group, agreed, compared, least))
        for group, agreed, compared in judged
        if compared - agreed >= LEAST_MISSES and (high := wilson(agreed, compared, z)[1]) < least
    ]
    return min(below, key=lambda one: one[0])[1] if below else None


def sureness_shift(lately: Likeness, usual: Likeness) -> tuple[float, float] | None:
    """Shift of (entropy, margin) against golden, less what is usual for this version, where either is beyond EFFECT; else None.

    Both directions count: inputs unlike those it was calibrated with can make a version surer than golden as well.
    """
    if min(lately.entropy.count, usual.entropy.count) < LEAST_PAIRS:
        return None
    entropy, margin = lately.entropy.effect - usual.entropy.effect, lately.margin.effect - usual.margin.effect
    return (entropy, margin) if max(abs(entropy), abs(margin)) > EFFECT else None
