"""How a process that works on jobs reaches the journal: what the store lost of what was seen here is put back, its absence is told once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from logging import Logger
from typing import Final

from app.domain import Event, State
from app.store.base import Journal, StoreUnavailable
from app.store.recovery import catch_up

AGAIN_S: Final = 1.0


class Away:
    """Tells a log when the journal goes and when it is back, however often it is asked meanwhile."""

    def __init__(self, log: Logger) -> None:
        self._log, self._away = log, False

    def gone(self, what: str, error: StoreUnavailable) -> None:
        if not self._away:
            self._log.warning("the journal is away %s: %s", what, error)
        self._away = True

    def back(self) -> None:
        if self._away:
            self._log.info("the journal is back")
        self._away = False


class Reach:
    """`ending`: set when the process ends; nothing waits longer."""

    def __init__(self, journal: Journal, ending: asyncio.Event) -> None:
        self.journal, self._ending = journal, ending
        self._seen: State | None = None

    async def state(self) -> State:
        self._seen = await asyncio.to_thread(catch_up, self.journal, self._seen)
        return self._seen

    async def state_at_last(self) -> State:
        """Waits while the journal is away: what was built is not thrown away for that."""
        while True:
            try:
                return await self.state()
            except StoreUnavailable:
                await self._rest()

    async def append_at_last(self, event: Event) -> None:
        """As `state_at_last`. Where an answer was lost the event may come twice."""
        while True:
            try:
                await asyncio.to_thread(self.journal.append, event)
                return
            except StoreUnavailable:
                await self._rest()
                await self.state_at_last()

    async def _rest(self) -> None:
        """Raises the error at hand where the process ends."""
        if self._ending.is_set():
            raise
        with suppress(TimeoutError):
            async with asyncio.timeout(AGAIN_S):
                await self._ending.wait()
