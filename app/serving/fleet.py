"""All models of this server: finds them in the repository, tells the journal what is new, and gives each its own reconciler.

It holds the last known state, so that serving goes on when the journal is away; then nothing changes until it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from time import monotonic
from typing import ParamSpec, TypeVar

from app.catalog.model_config import ModelConfig
from app.catalog.repository import FoundModel, Repository
from app.catalog.reservoir import Reservoir
from app.domain import JSON, Event, State
from app.errors import HoneError
from app.serving.admission import Admission
from app.serving.loader import Loader
from app.serving.own_repository import OwnRepository, wants
from app.serving.past_deaths import PastDeaths
from app.serving.reconcile import ModelReconciler
from app.serving.recorder import Recorder
from app.serving.service import REJECTIONS, InferenceService
from app.serving.slot import Slot
from app.serving.warm import way_back_gone
from app.store.base import Journal, StoreUnavailable
from app.store.recovery import catch_up
from app.telemetry.metrics import Metrics

log = logging.getLogger("hone.serving")
WATCH_S = 2.0
GONE = "its folder is gone from the repository"
P = ParamSpec("P")
T = TypeVar("T")
SWAPS = ("activated", "swapped", "settings", "failed")


class Fleet:
    """One per server. `run` follows the journal and the repository; `ready` after the first pass over all models."""

    def __init__(
        self, service: InferenceService, repository: Repository, admission: Admission, loader: Loader, journal: Journal, record: Recorder,
        metrics: Metrics, reservoir: Callable[[str, ModelConfig], Reservoir], poll_s: float, keep_state: Callable[[State], None],
        past: PastDeaths, known: State | None = None, told: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self._past = past
        self._service, self._repository, self._admission, self._loader = service, repository, admission, loader
        self._journal, self._record, self._metrics, self._reservoir = journal, record, metrics, reservoir
        self._poll_s, self._keep_state, self._told = poll_s, keep_state, told
        self._reconcilers: dict[str, ModelReconciler] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._readying: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._ending = False
        self._wake = asyncio.Event()
        self._scan_due = True
        self._found: dict[str, FoundModel] = {}
        self._leaving: set[str] = set()
        self._coming: set[str] = set()
        self._own = OwnRepository()
        self.state = known or State()
        self._remembered = known is not None
        self.store_error = ""
        self._frozen, self._kept = False, True  # as the log was told, which begins with this process
        self.repository_error = ""
        self.board: dict[str, JSON] = {}
        self.latest: dict[str, JSON] = {}
        """The newest event of each model: seq, and kind and at where the store still has it."""
        self.warnings: list[str] = []
        self.ready = False
        service.complete = False
        self.listeners: list[Callable[[State], None]] = []
        self.refused: Callable[[], str] = str
        """Why the store takes nothing, though it can be read; '' while it does."""

    async def run(self) -> None:
        watcher = asyncio.create_task(self._watch(), name="journal-watch")
        try:
            next_scan = 0.0
            while True:
                self._wake.clear()
                scan = self._scan_due or (self._poll_s > 0 and monotonic() >= next_scan)
                if scan:
                    self._scan_due, next_scan = False, monotonic() + self._poll_s
                try:
                    await self._pass(scan)
                except Exception:
                    log.exception("a pass over all models failed; the next one tries again")
                wait_s = max(0.05, next_scan - monotonic()) if self._poll_s else 5.0
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            watcher.cancel()

    async def _pass(self, scan: bool) -> None:
        if scan:
            await self._scan()
        await self.refresh()
        self._direct()
        if self._readying is None and not self.repository_error:
            self._readying = asyncio.create_task(self._first(), name="first-pass")

    async def close(self) -> None:
        for task in (*self._tasks.values(), *((self._readying,) if self._readying is not None else ())):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._closing, return_exceptions=True)
        await asyncio.gather(*(reconciler.close() for reconciler in self._reconcilers.values()))

    def poke(self, scan: bool = False) -> None:
        """Look again now; with `scan` at the repository too."""
        self._scan_due = self._scan_due or scan
        self._wake.set()

    def removing(self, name: str) -> AbstractContextManager[None]:
        """While somebody removes a model, its missing folder is not news: the one who removes it says so."""
        return _held(self._leaving, name)

    def deploying(self, name: str) -> AbstractContextManager[None]:
        """While somebody deploys a model, its new files are not news: the one who brings them says so."""
        return _held(self._coming, name)

    async def rescan(self) -> None:
        """Look at the repository now, and let every reconciler know."""
        await self._scan()
        self._direct()

    def reconciler(self, model: str) -> ModelReconciler:
        self._service.slot(model)  # raises why there is none
        return self._reconcilers[model]

    async def carry_out(self, command: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run one blocking command off the event loop, then look at what it changed. Raises what the command raises."""
        result = await asyncio.to_thread(command, *arguments, **named)
        await self.refresh()
        self.poke()
        return result

    async def settle(self, model: str, reached: Callable[[Slot], bool], timeout_s: float) -> bool:
        """Wait until `reached(slot)` holds, bounded; True if it does. Who waits for a model that leaves meanwhile waits no longer."""
        until = monotonic() + timeout_s
        was_there = False
        while monotonic() < until:
            reconciler = self._reconcilers.get(model)
            if reconciler is not None and reached(reconciler.slot):
                return True
            if reconciler is None and was_there:
                return False
            was_there = reconciler is not None
            await asyncio.sleep(0.02)
        return False

    def unloaded(self, model: str) -> bool:
        """Whether the model is there and shall not answer, as far as the journal is known here."""
        want = self.state.models.get(model)
        return want is not None and want.unloaded

    async def news(self, after: int, timeout_s: float) -> int | None:
        """Wait, bounded, for an event later than `after`. The number of the latest one; None once the server ends.

        Any number may wait: one task asks the journal for all of them.
        """
        if self.state.seq <= after and not self._ending:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                pass
        return None if self._ending else self.state.seq

    def end_news(self) -> None:
        """The server is about to end: whoever waits for news need not any more."""
        self._ending = True
        self._news.set()

    # ---- following
    async def _watch(self) -> None:
        """Wake `run` when another process wrote an event."""
        while True:
            try:
                if await asyncio.to_thread(self._journal.wait, self.state.seq, WATCH_S):
                    self._wake.set()
                    await asyncio.sleep(0.02)
            except StoreUnavailable:
                await asyncio.sleep(1.0)
            except Exception:
                log.exception("the journal could not be watched")
                await asyncio.sleep(1.0)

    async def refresh(self) -> None:
        """The newest state and board; while the store is away, the last ones stand."""
        try:
            state, self.board = await asyncio.to_thread(self._catch_up)
        except (StoreUnavailable, OSError) as error:
            self._journal_is_away(error)
            self._metrics.gauge("hone_store_up", value=0)
            return
        refused = self.refused()
        if refused:
            self._journal_is_away(refused)
        elif self.store_error:
            log.info("the journal is back")
            self.store_error = ""
        self._metrics.gauge("hone_store_up", value=0 if refused else 1)
        if state.frozen and not self._frozen:
            log.warning("all change is frozen, but rollback, until `hone unfreeze`: %s", state.frozen_because)
        elif self._frozen and not state.frozen:
            log.info("change is allowed again")
        self._frozen = state.frozen
        if state.seq != self.state.seq:
            self.state = state
            self._news.set()
            self._news = asyncio.Event()
            try:
                await asyncio.to_thread(self._keep_state, state)
                self._kept = True
            except OSError as error:
                log.log(logging.WARNING if self._kept else logging.DEBUG, "the last state cannot be kept in a file for now: %s", error)
                self._kept = False
            for listener in self.listeners:
                listener(state)

    def _catch_up(self) -> tuple[State, dict[str, JSON]]:
        """The store's state, after putting back what it lost of what was seen here; blocks."""
        self.warnings = self._journal.warnings()  # first: they may tell why something was lost
        state = catch_up(self._journal, self.state if self._remembered else None)
        self._remembered = True
        self._note_latest(state)
        return state, self._journal.board()

    def _note_latest(self, state: State) -> None:
        """What happened last with each model; blocks, but asks only where something did, and once: Redis reads all to miss what it let go."""
        latest = {name: self.latest.get(name, {}) for name in state.models}
        for name, model in state.models.items():
            if latest[name].get("seq") != model.last_event:
                latest[name] = {"seq": model.last_event}
                for event in self._journal.read(model.last_event - 1, 1, name):
                    latest[name] |= {"kind": event.kind, "at": event.at}
        self.latest = latest

    async def _scan(self) -> None:
        """Look at the repository, and tell the journal of golden versions that are new, changed or gone."""
        coming = frozenset(self._coming)
        try:
            models = await asyncio.to_thread(self._repository.scan)
        except HoneError as error:
            if not self.repository_error:
                log.warning("%s", error)
            self.repository_error = str(error)
            return
        self.repository_error = ""
        self._found = {model.name: model for model in models}
        await self.refresh()
        if self.store_error:
            return
        self._own.begin(self.state.epoch)
        for model in models:
            if not model.error and model.name not in coming | self._coming:
                await self._announce(model)
        away = self.state.models.keys() - self._found.keys() - self._leaving
        gone = [Event("model.removed", name, data={"reason": GONE}) for name in away if self._own.lost(name, self._admission.served_here)]
        self._own.end(self._found, [event.model for event in gone if not await self._append(event)])
        await self.refresh()
        for model in models:
            if not model.error and (version := way_back_gone(self.state.models.get(model.name), model)):
                await self._append(Event("version.removed", model.name, version, data={"version": version, "reason": GONE}))

    async def _announce(self, model: FoundModel) -> None:
        assert model.golden is not None
        try:
            sha256 = await asyncio.to_thread(self._repository.sha256, model.golden)
        except HoneError as error:
            self._found[model.name] = replace(model, error=str(error))
            return
        known, own = self.state.models.get(model.name), (model.golden.number, sha256)
        data = {"golden": model.golden.number, "sha256": sha256, "replaces": known.golden if known else ""}
        event = Event("model.deployed", model.name, model.golden.number, data=data)
        news = self._own.is_news(model.name, own, self.state)
        if not news or await self._append(event):
            self._own.holds(model.name, own, news or wants(known, own))

    async def _append(self, event: Event) -> bool:
        try:
            await asyncio.to_thread(self._journal.append, event)
        except StoreUnavailable as error:
            self._journal_is_away(error)
            return False
        self._metrics.count("hone_events", event.kind)
        return True

    def _journal_is_away(self, error: StoreUnavailable | OSError | str) -> None:
        if not self.store_error:
            log.warning("the journal is away, so nothing changes here until it is back: %s", error)
        self.store_error = str(error)

    # ---- directing
    def _direct(self) -> None:
        """Give every reconciler what it shall reach."""
        for name, found in self._found.items():
            reconciler = self._reconcilers.get(name) or self._begin(name, found)
            slot = reconciler.slot
            trouble = self._told(found.error) if found.error and slot.active is not None else ""
            if trouble and slot.trouble != trouble:
                log.warning("model %s goes on as it was: %s", name, trouble)
            slot.trouble = trouble
            if slot.trouble and reconciler.found is not None:
                found = reconciler.found  # a model.yaml that became wrong changes nothing for a model that serves
            config = found.config or ModelConfig()
            slot.config = config
            threshold_s = config.objective.promise.threshold_s if config.objective.promise is not None else None
            self._metrics.objective(name, threshold_s)
            self._service.window.objective(name, threshold_s)
            want = self.state.models.get(name)
            if (reconciler.want, reconciler.found) != (want, found):
                reconciler.want, reconciler.found = want, found
                reconciler.changed.set()
        for name in [name for name in self._reconcilers if name not in self._found]:
            self._end(name)
        self._service.complete = self._service.complete or not self.repository_error

    def _begin(self, name: str, found: FoundModel) -> ModelReconciler:
        config = found.config or ModelConfig()
        slot = Slot(name, config, self._reservoir(name, config))
        self._service.slots[name] = slot
        for outcome in SWAPS:  # a counter that is born at 1 hides its first event from Prometheus's increase()
            self._metrics.count("hone_swaps", name, outcome, by=0.0)
        for reason in REJECTIONS:
            self._metrics.count("hone_rejections", name, reason, by=0.0)
        reconciler = ModelReconciler(
            slot, self._service, self._admission, self._loader, self._record, self._metrics, self._past, self._told
        )  # fmt: skip
        self._reconcilers[name] = reconciler
        self._tasks[name] = asyncio.create_task(reconciler.run(), name=f"reconcile-{name}")
        return reconciler

    def _end(self, name: str) -> None:
        """The model is gone: no new requests, what runs is answered, and the rest is freed."""
        self._service.slots.pop(name, None)
        self._metrics.objective(name, None)
        self._tasks.pop(name).cancel()
        reconciler = self._reconcilers.pop(name)
        closing = asyncio.create_task(reconciler.close(), name=f"close {name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _first(self) -> None:
        """Ready once every model was tried once: one broken model makes itself unready, not the server."""
        await asyncio.gather(*(reconciler.settled.wait() for reconciler in self._reconcilers.values()))
        self.ready = True
        self._metrics.gauge("hone_server_ready", value=1)


@contextlib.contextmanager
def _held(names: set[str], name: str) -> Iterator[None]:
    names.add(name)
    try:
        yield
    finally:
        names.discard(name)
