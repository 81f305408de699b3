"""How a process that works on jobs reaches the journal: what the store lost of what was seen here is put back, its absence is told once."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import asdict
from logging import Logger
from typing import Final

from app.domain import JSON, Event, State
from app.store.base import Journal, StoreUnavailable
from app.store.recovery import catch_up
from optimizers.base import Progress

AGAIN_S: Final = 1.0
log = logging.getLogger("hone.control")


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


class Shown:
    """Puts the progress of one task on the board, in a thread. One at a time, the newest of what comes meanwhile next: a store that hangs
    must not hold a thread for each line of a task."""

    def __init__(self, journal: Journal, key: str, ttl_s: float) -> None:
        self._journal, self._key, self._ttl_s = journal, key, ttl_s
        self._newest: Progress | None = None
        self._busy = False

    def __call__(self, seen: Progress) -> None:
        self._newest = seen
        self._go_on()

    def _go_on(self) -> None:
        if self._busy or self._newest is None:
            return
        value, self._newest = asdict(self._newest), None
        with suppress(RuntimeError):  # the process ends, and takes no thread any more
            posting = asyncio.get_running_loop().run_in_executor(None, self._post, value)
            self._busy = True
            posting.add_done_callback(self._posted)

    def _posted(self, posting: asyncio.Future[None]) -> None:
        self._busy = False
        self._go_on()

    def _post(self, value: JSON) -> None:
        try:
            self._journal.post(self._key, value, self._ttl_s)
        except StoreUnavailable:
            log.debug("the progress of %s could not be shown", self._key)


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
