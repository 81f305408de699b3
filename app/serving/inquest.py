"""What the unasked end of a runner means to the requests that were in it: each is tried again, one at a time and alone, so that a row which
kills runners is found and quarantined. It knows neither queues nor how a runner comes back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from app.errors import Quarantined, RunnerLost
from app.serving.batcher import Work
from app.serving.quarantine import Quarantine, hash_of
from app.serving.runners import Ending

_TRIES: Final = 3
_log = logging.getLogger("hone.engine")


@dataclass(frozen=True, slots=True)
class Death:
    """One unasked end of a runner and the hashes of the inputs that were in it."""

    reason: str
    pid: int
    hashes: tuple[str, ...]
    at: float


class Inquest:
    """Of one version, `name`. `on_death(reason, pid, hashes)` is called for each death; `killers` are inputs that killed a runner when run alone."""

    def __init__(
        self, name: str, quarantine: Quarantine, killers: set[str], on_death: Callable[[str, int, tuple[str, ...]], None] | None
    ) -> None:  # fmt: skip
        self.deaths: deque[Death] = deque(maxlen=64)
        self._name, self._quarantine, self._killers, self._on_death = name, quarantine, killers, on_death

    async def hold(self, ending: Ending, pid: int, lost: list[list[Work]]) -> list[Work]:
        """Write the death down, quarantine a row that was alone twice, and return who is up for another try. `lost`: by batch, the oldest first."""
        works = [work for group in lost for work in group]
        hashes = tuple([await hash_of(work.request) for work in works])
        self.deaths.append(Death(ending.reason, pid, hashes, monotonic()))
        _log.warning("%s: %s (pid %d, %d requests in it)", self._name, ending.reason, pid, len(works))
        if self._on_death is not None:
            self._on_death(ending.reason, pid, hashes)
        again: list[Work] = []
        for work, digest in zip(works, hashes, strict=True):
            work.tries += 1
            if len(works) == 1 and ending.own_fault and work.tries > 1:
                self._killers.add(digest)
                self._quarantine.add(digest, ending.reason)
                work.fail(Quarantined(f"this input ended a runner of {self._name} twice, the second time alone ({ending.reason})"))
            elif work.tries >= _TRIES:
                work.fail(RunnerLost(f"the runner of {self._name} ended {work.tries} times with this request in it: {ending.reason}"))
            elif not work.future.done() or ending.own_fault:
                again.append(work)
        return again
