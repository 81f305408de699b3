"""Whether a version's threads run only where nobody else wants the core: a model that takes more than its share does, or one that is asked for
more than it can answer, beside one that is content with less.

Tokens bound how much of the cores a model has; who is on one decides the kernel, and a thread that computes without end keeps one that just
woke up waiting for a slice of some milliseconds. Under SCHED_IDLE it gives way at once, and the scheduler takes its core for a free one. What
that would cost beside programs of others is watched: who is left with next to nothing stands firm again. It knows no threads and no requests.
"""

from __future__ import annotations

import math
from typing import Final

from app.serving.ledger import LIGHT

LIGHT_AGAIN: Final = 0.6
"""Of its share of the cores: who used LIGHT of it or more is heavy, and stays so until it uses less than this."""
AFTER_S: Final = 0.5
"""So long somebody must be heavy before it gives way."""
STARVED: Final = 0.25
STARVED_S: Final = 1.0
"""Who has work and got less than this part of its share for so long is starved, by programs of others."""
FIRM_S: Final = 30.0
MOST_FIRM_S: Final = 1800.0
"""How long it stands firm then; twice as long each time, at most this."""

MOST_BETWEEN_S: Final = 1.0
"""Between two looks that are further apart there was no work, and nobody it could have given way to."""


class Manners:
    """One per engine. Looked at a few times a second while there is work."""

    __slots__ = ("_firm_s", "_firm_until", "_heavy_since", "_looked_at", "_starved_since", "yielded_s", "yields")

    def __init__(self) -> None:
        self.yields = False
        self.yielded_s = 0.0
        """So long it gave way until the last look, in all."""
        self._looked_at = -math.inf
        self._firm_s = FIRM_S
        self._firm_until = -math.inf
        self._heavy_since = math.inf
        self._starved_since = math.inf

    def look(self, of_share: float, company: bool, waits: bool, now: float, overrun: bool = False) -> bool:
        """Whether to give way from now on. `of_share`: what it lately used of its share of the cores; `company`: somebody lighter is active;
        `overrun`: it is asked for more than it can answer, and would take whatever cores others left it (what a flood of small requests costs the
        server and its callers keeps it below its share)."""
        if self.yields:
            self.yielded_s += min(now - self._looked_at, MOST_BETWEEN_S)
        self._looked_at = now
        if not company or now < self._firm_until:
            self._stop()
            return False
        if not self.yields:
            self._heavy_since = min(self._heavy_since, now) if of_share >= LIGHT or overrun else math.inf
            self.yields = now - self._heavy_since >= AFTER_S
            return self.yields
        if of_share >= STARVED or not waits:
            self._starved_since = math.inf
            if of_share < LIGHT_AGAIN and not waits:
                self._stop()
            return self.yields
        self._starved_since = min(self._starved_since, now)
        if now - self._starved_since >= STARVED_S:
            self._stop()
            self._firm_until = now + self._firm_s
            self._firm_s = min(MOST_FIRM_S, 2 * self._firm_s)
        return self.yields

    def _stop(self) -> None:
        self.yields = False
        self._heavy_since = self._starved_since = math.inf
