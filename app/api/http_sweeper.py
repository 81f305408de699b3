"""One timer for all connections of a server, instead of one per request: some times a second each connection checks its own times."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, Protocol

from uvicorn.server import ServerState

SWEEP_S: Final = 0.5


class Connection(Protocol):
    def check(self, now: float) -> None: ...


class Sweeper:
    """Runs while there are connections."""

    def __init__(self, connections: Collection[Connection], loop: asyncio.AbstractEventLoop) -> None:
        self._connections = connections
        self._loop = loop
        self._running = False

    @classmethod
    def of(cls, state: ServerState, loop: asyncio.AbstractEventLoop) -> Sweeper:
        """The sweeper of a server; it lives on the server's state."""
        sweeper: Sweeper | None = vars(state).get("hone_sweeper")
        if sweeper is None or sweeper._loop is not loop:
            sweeper = vars(state)["hone_sweeper"] = cls(state.connections, loop)  # type: ignore[arg-type]
        return sweeper

    def start(self) -> None:
        if not self._running:
            self._running = True
            self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection in list(self._connections):
            connection.check(now)
        self._running = bool(self._connections)
        if self._running:
            self._loop.call_later(SWEEP_S, self._sweep)
