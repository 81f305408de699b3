"""Reads what is known only by asking: memory and CPU time of runners, who gave way, queues, and how late the event loop is. Each few seconds, off the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from time import monotonic
from typing import Final, Protocol

from app.telemetry.metrics import Metrics

log = logging.getLogger("hone.telemetry")
EVERY_S: Final = 5.0
Key = tuple[str, str]


class EngineFacts(Protocol):
    """What is asked of a runner's engine."""

    @property
    def queued(self) -> int: ...
    @property
    def inflight(self) -> int: ...
    @property
    def yielded_s(self) -> float: ...
    def memory_bytes(self) -> int: ...
    def cpu_seconds(self) -> float: ...


class Watched(Protocol):
    """Who knows the loaded versions: (model, version), optimizer, precision, engine, and a place for the memory that was read."""

    def engines(self) -> Iterable[tuple[Key, str, str, EngineFacts]]: ...
    def readiness(self) -> Iterable[tuple[str, bool]]: ...
    def remember_memory(self, key: Key, memory_bytes: int) -> None: ...


class Poller:
    """Queue and in-flight gauges are read at each scrape; memory and CPU time every few seconds."""

    def __init__(self, watched: Watched, metrics: Metrics) -> None:
        self._watched, self._metrics = watched, metrics
        self._seen: dict[tuple[str, Key, int], float] = {}
        """The totals of each engine that were counted already, by metric."""
        metrics.before_scrape.append(self.refresh)

    async def run(self) -> None:
        while True:
            due = monotonic() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self._metrics.gauge("hone_event_loop_lag_seconds", value=max(0.0, monotonic() - due))
            try:
                await self._read_processes()
            except OSError as error:
                log.warning("runner processes could not be read: %s", error)

    def refresh(self) -> None:
        """What costs nothing to read."""
        engines = list(self._watched.engines())
        gauges = self._metrics
        gauges.replace_gauge("hone_queue_depth", [(key, float(engine.queued)) for key, _, _, engine in engines])
        gauges.replace_gauge("hone_inflight_requests", [(key, float(engine.inflight)) for key, _, _, engine in engines])
        gauges.replace_gauge("hone_model_info", [((*key, optimizer, precision), 1.0) for key, optimizer, precision, _ in engines])
        gauges.replace_gauge("hone_model_ready", [((model,), float(ready)) for model, ready in self._watched.readiness()])

    async def _read_processes(self) -> None:
        engines = list(self._watched.engines())
        read = await asyncio.to_thread(lambda: [(key, id(e), e.memory_bytes(), e.cpu_seconds()) for key, _, _, e in engines])
        self._metrics.replace_gauge("hone_model_memory_bytes", [(key, float(memory)) for key, _, memory, _ in read])
        for key, identity, memory, cpu_s in read:
            self._watched.remember_memory(key, memory)
            self._count("hone_model_cpu_seconds", key, identity, cpu_s)
        for key, _, _, engine in engines:
            self._count("hone_model_yielding_seconds", key, id(engine), engine.yielded_s)
        alive = {(key, identity) for key, identity, _, _ in read}
        self._seen = {known: total for known, total in self._seen.items() if known[1:] in alive}

    def _count(self, name: str, key: Key, identity: int, total: float) -> None:
        """Count what an engine's total grew by since it was read last."""
        before = self._seen.get((name, key, identity))
        if before is None or total > before:
            self._metrics.count(name, *key, by=total - (before or 0.0))
            self._seen[(name, key, identity)] = total
