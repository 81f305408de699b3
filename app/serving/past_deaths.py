"""Deaths of runners in an earlier life of this server, from the journal: a version that takes everything down with it must not begin anew each time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic, time
from typing import Final

from app.domain import Event, State
from app.serving.at_work import Unfinished
from app.store.base import Journal, StoreUnavailable
from app.store.kinds import version_of
from app.store.recovery import catch_up

DEATHS_S: Final = 300.0
DEADLY: Final = 3
"""So many deaths within DEATHS_S are a version's fault."""
READ_BACK: Final = 1000
AGAIN_S: Final = 2.0
ANEW: Final = frozenset({"model.deployed", "model.removed"})
"""What came before one of these says nothing of the model that serves since."""


@dataclass(frozen=True, slots=True)
class PastDeath:
    """`age_s` at the time of the look. `whole`: `server` and all its runners ended with it."""

    age_s: float
    outside: bool
    whole: bool = False
    server: str = ""


def own_doing(reason: str) -> bool | None:
    """Whether a runner ended by itself; False where somebody killed or stopped it, None where nobody could tell."""
    return None if "nobody could tell" in reason else "from outside" not in reason


class PastDeaths:
    """One per server: what died before it was started. `remember` learns it; until then nothing is known."""

    def __init__(self, unfinished: Sequence[Unfinished] = ()) -> None:
        self._began = time()
        self._ahead_s = 0.0
        """How far the store's clock is ahead of this host's, where it is known."""
        self._untold = list(unfinished)
        self._found: dict[tuple[str, str], list[PastDeath]] = {}
        self._found_at = 0.0

    async def remember(self, journal: Journal, known: State | None = None) -> None:
        """Tell the journal what ended together with the server before, and learn what died; while the store is away, try again as long as it matters.

        What it lost of `known`, the last that the server before saw, is put back first: it takes nothing until then."""
        until = monotonic() + DEATHS_S
        while monotonic() < until:
            try:
                await asyncio.to_thread(catch_up, journal, known)
                await asyncio.to_thread(self._tell, journal)
                events = await asyncio.to_thread(journal.read, 0, READ_BACK, "", True)
            except StoreUnavailable:
                await asyncio.sleep(AGAIN_S)
                continue
            found = past_deaths(events, time() + self._ahead_s, DEATHS_S, self._began + self._ahead_s)
            self._found, self._found_at = found, monotonic()
            return

    def recent(self, model: str, version: str) -> list[PastDeath]:
        """Those of the last five minutes. Of servers that ended whole those of the one that did most often: of several that a power cut
        or an order ended together each ended once, and that is no version's fault."""
        elapsed = monotonic() - self._found_at
        recent = [death for death in self._found.get((model, version), ()) if elapsed + death.age_s < DEATHS_S]
        ((worst, _),) = Counter(death.server for death in recent if death.whole).most_common(1) or [("", 0)]
        return [death for death in recent if not death.whole or death.server == worst]

    def took_all_down(self, model: str, version: str) -> int:
        """How often it died within five minutes, the whole server with it; 0 where that is less often than counts against a version."""
        recent = [death for death in self.recent(model, version) if not death.outside]
        return len(recent) if len(recent) >= DEADLY and any(death.whole for death in recent) else 0

    def bearable(self, model: str, desired: str, before: str, company: bool) -> tuple[str, str]:
        """(version to load, why not the desired one): the one `before` where the server died with the desired one again and again, before
        anybody could say so. Where that is no other, '' and the model waits, if there is `company` that can be served meanwhile, and no
        other model was at work each time as well, so that nobody can tell which it was."""
        deaths = self.took_all_down(model, desired)
        why = f"the whole server died with it {deaths} times in five minutes" if deaths else ""
        if deaths and before != desired and not self.took_all_down(model, before):
            return before, why
        alone = all(key == (model, desired) or not self.took_all_down(*key) for key in self._found)
        return ("", why) if deaths and company and alone else (desired, "")

    def forgive(self, model: str) -> None:
        """Somebody wants it all the same."""
        self._found = {key: deaths for key, deaths in self._found.items() if key[0] != model}

    def _tell(self, journal: Journal) -> None:
        while self._untold:
            one = self._untold[0]
            before_s = max(0.0, time() - one.at)  # clocks of hosts differ, lengths of time do not
            data = {"reason": one.reason, "ended_s_ago": round(before_s, 1), "server": one.server}
            stored = journal.append(Event("runner.died", one.model, one.version, data=data))
            self._ahead_s = stored.at - time()
            self._untold.pop(0)


def past_deaths(newest_first: Iterable[Event], now: float, most_s: float, before: float) -> dict[tuple[str, str], list[PastDeath]]:
    """By model and version, those of the last `most_s` seconds that were written until `before` (unix seconds by the store's clock, as `now`), or that tell of what was before."""
    found: dict[tuple[str, str], list[PastDeath]] = {}
    over: set[str] = set()
    wanted: set[tuple[str, str]] = set()
    for event in newest_first:
        if event.at < now - most_s:
            break
        if event.kind in ANEW:
            over.add(event.model)
        elif event.kind == "desired.changed":  # somebody, or the loop, gives it another chance
            wanted.add((event.model, version_of(event)))
        elif event.kind == "runner.died" and event.model not in over and (event.model, version_of(event)) not in wanted:
            earlier_s = event.data.get("ended_s_ago")
            whole = isinstance(earlier_s, int | float)
            at = event.at - (float(earlier_s) if isinstance(earlier_s, int | float) else 0.0)
            if at >= now - most_s and (whole or at <= before):
                own = own_doing(str(event.data.get("reason")))
                if own is not None:
                    death = PastDeath(max(0.0, now - at), not own, whole, str(event.data.get("server", "")))
                    found.setdefault((event.model, version_of(event)), []).append(death)
    return found
