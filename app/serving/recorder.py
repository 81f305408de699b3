"""Writes what the data plane tells to the journal, in order and off the event loop; it keeps nobody waiting, and knows no models."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from app.domain import Event
from app.store.base import Journal, StoreUnavailable
from app.telemetry.metrics import Metrics

log = logging.getLogger("hone.serving")


class Recorder:
    """Writes events in order, off the event loop; while the store is away they wait, bounded, and the newest win."""

    def __init__(self, journal: Journal, metrics: Metrics) -> None:
        self._journal, self._metrics = journal, metrics
        for operation in ("append", "dropped"):  # a counter that is born at 1 hides its first event from Prometheus's increase()
            metrics.count("hone_store_errors", operation, by=0.0)
        self._waiting: asyncio.Queue[Event] = asyncio.Queue(1000)
        self._pool = ThreadPoolExecutor(1, "journal-writer")
        self.refused = ""
        """Why an event waits."""

    def __call__(self, event: Event) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
            self._metrics.count("hone_store_errors", "dropped")
        self._waiting.put_nowait(event)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            event = await self._waiting.get()
            while True:
                try:
                    await loop.run_in_executor(self._pool, self._journal.append, event)
                    self._metrics.count("hone_events", event.kind)
                    self.refused = ""
                    break
                except StoreUnavailable as error:
                    self.refused = str(error)
                    self._metrics.count("hone_store_errors", "append")
                    await asyncio.sleep(1.0)
                except Exception:
                    log.exception("event %s of %s could not be written", event.kind, event.model)
                    break
            self._waiting.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Wait, bounded, until everything is written."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._waiting.join()
        except TimeoutError:
            log.warning("the journal did not take the last events within %.0f s", timeout_s)
