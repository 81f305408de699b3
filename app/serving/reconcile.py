"""Makes the server be what the journal says: loads the desired version, checks it, swaps the pointer, drains and stops the old one.

Level-triggered: every pass compares desired with active, so a crash at any point is repaired by the next pass. Rollback is the same path.
It decides nothing about which version is better; it only refuses to serve what does not load or does not agree with golden's outputs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic, time

from app.catalog.model_config import ModelConfig
from app.catalog.processing import Processor
from app.catalog.repository import FoundModel
from app.domain import Event, Generation, ModelState, VersionState
from app.errors import Conflict, HoneError, InsufficientStorage, ModelRejected, NotFound
from app.serving.admission import Admission, Admitted
from app.serving.backoff import Backoff
from app.serving.loader import Loader
from app.serving.mirror import Mirror
from app.serving.past_deaths import PastDeaths
from app.serving.reference import ReferenceFreezer, usual_classes
from app.serving.reread import runs_as_told, takes_live
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Share, Slot, asked_alike
from app.serving.warm import expired, known, surplus
from app.telemetry.metrics import Metrics

log = logging.getLogger("hone.serving")

Recorder = Callable[[Event], None]
DRAIN_S = 30.0
DEADLY_INPUTS = 3
"""So many different inputs that killed a runner count against the version; one alone counts against the input."""


def _before(want: ModelState) -> str:
    return want.previous if want.previous and want.previous != want.desired else want.golden


def _surroundings(found: FoundModel, admitted: Admitted) -> tuple[object, ...]:
    """What pre- and post-processing depend on."""
    return admitted.golden_sha256, found.config, found.beside


class ModelReconciler:
    """Brings one model to its desired state; its passes never overlap, and other models never notice them."""

    def __init__(
        self, slot: Slot, service: InferenceService, admission: Admission, loader: Loader, record: Recorder, metrics: Metrics,
        past: PastDeaths, told: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self.slot = slot
        self._told, self._past = told, past
        self._service, self._admission, self._loader = service, admission, loader
        self._record, self._metrics = record, metrics
        self._backoff, self._warm_backoff = Backoff(), Backoff()
        self._left_deadly: tuple[str, Generation] | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._reference = ReferenceFreezer(slot, admission, loader, record)
        self._prepared: tuple[object, ...] | None = None
        self._unfit: tuple[object, ...] | None = None
        self._unserved = ""
        self._turn, self._closed = asyncio.Lock(), False
        self.changed = asyncio.Event()
        self.settled = asyncio.Event()
        self.want: ModelState | None = None
        self.found: FoundModel | None = None

    async def run(self) -> None:
        """Pass after pass: when something changed, and each second for retries and warm versions whose time is over."""
        while True:
            self.changed.clear()
            try:
                async with self._turn:
                    await self.converge()
            except HoneError as error:
                self.slot.reason = self._told(str(error))
            except Exception as error:
                log.exception("model %s: a pass failed", self.slot.name)
                self.slot.reason = f"internal error: {type(error).__name__}; the log tells more"
            self.settled.set()
            try:
                async with asyncio.timeout(1.0):
                    await self.changed.wait()
            except TimeoutError:
                pass

    async def converge(self) -> None:
        """One pass."""
        want, found, slot = self.want, self.found, self.slot
        unserved = self._told(found.error) if found is not None and slot.active is None else ""
        if unserved:
            slot.reason = unserved
        if unserved not in ("", self._unserved):
            log.warning("model %s is not served: %s", slot.name, unserved)
        self._unserved = unserved
        if want is None or found is None:
            return
        slot.golden, slot.desired, slot.unloaded = want.golden, want.desired, want.unloaded
        slot.golden_kind = next((version.kind for version in found.versions if version.number == want.golden), slot.golden_kind)
        slot.known = known(want, found)
        for version in slot.failed.keys() - {*slot.known, want.desired}:
            del slot.failed[version]  # its folder is gone
        if want.unloaded:
            slot.active, slot.reason = None, ""
            for loaded in list(slot.versions.values()):
                await self._stop(loaded)
            return
        for loaded in expired(slot, want, monotonic()):
            self._later(self._stop(loaded))
        if bearable := self._bearable(want):
            await self._reach(want, found, bearable)
            if slot.active is None and bearable != want.golden:
                await self._reach(want, found, want.golden)
        await self._follow_model_yaml(want, found)
        await self._share(want, found)
        if slot.active is not None:
            await self._follow_processing(found, slot.active.admitted)
        if slot.reservoir.pending:
            await asyncio.to_thread(slot.reservoir.store_pending)
        if slot.active is not None:
            self._leave_deadly(slot.active, want)
            self._reference.freeze(found, want, self.changed.set)
        if slot.active is not None and slot.active.version != want.golden and want.golden not in slot.versions:
            await self._warm(want, found, want.golden)

    async def load_version(self, version: str) -> Loaded:
        """Load one version beside the active one and keep it warm, on request. Raises NotFound or why it does not load."""
        async with self._turn:
            want, found = self.want, self.found
            if self._closed or want is None or found is None or version not in self.slot.known:
                raise NotFound(f"model {self.slot.name!r} has no version {version!r}; it has {', '.join(self.slot.known) or 'none'}")
            if want.unloaded:
                raise Conflict(f"model {self.slot.name!r} is unloaded; load it with POST /v2/repository/models/{self.slot.name}/load")
            if version == want.desired:
                self.try_again(version)  # the remedy that is told where deaths of the past keep it from being loaded
            loaded = self.slot.versions.get(version) or await self._load(want, found, version, serves=version == want.desired)
            loaded.pinned = True
            self.slot.versions[version] = loaded
            await self._bound_warm(want)
            return loaded

    def try_again(self, version: str) -> None:
        """Somebody asks for `version` anew: what was wrong with it before does not count, nor does the wait that followed."""
        self._backoff.forget(version)
        self._warm_backoff.forget(version)
        self._past.forgive(self.slot.name)
        self.slot.failed.pop(version, None)
        self.changed.set()

    def refuses(self, version: str, generation: int) -> bool:
        """Whether `version` was tried for this generation, or a later one, and does not load."""
        return version in self.slot.failed and self._backoff.failed_for(version, generation)

    async def close(self) -> None:
        self._closed, self.slot.active = True, None
        self._reference.close()
        async with self._turn:
            pass  # a version that is being loaded on request is stopped with the others
        await asyncio.gather(*(self._stop(loaded) for loaded in list(self.slot.versions.values())))
        await asyncio.gather(*self._stopping, return_exceptions=True)

    # ---- one version
    async def _reach(self, want: ModelState, found: FoundModel, version: str) -> None:
        """Make `version` the active one, unless it is, or failed a moment ago."""
        slot, active = self.slot, self.slot.active
        given = want.settings_of(version)
        current = slot.versions.get(version)
        if current is not None and current.admitted.golden_sha256 != want.golden_sha256 and version == want.golden:
            current = None
        if current is not None and not await self._runs_as_told(current, want, found):
            current = None
        fits = current is not None and (given is None or given == current.settings)
        if fits and current is not None:
            if active is not current:
                self._swap(current, want, 0.0)
            current.generation = want.generation.n
            return
        if current is not None and given is not None and not current.settings.needs_new_session(given):
            current.engine.apply(given)
            current.settings, current.generation = given, want.generation.n
            if active is not current:
                self._swap(current, want, 0.0)
            else:
                self._activated(current, want, 0.0)
            return
        identity = (want.golden_sha256, want.generation, given, slot.config, found.beside)
        if self._backoff.blocked(version, identity):
            return
        began = monotonic()
        try:
            loaded = await self._load(want, found, version, serves=True)
        except HoneError as error:
            self._failed(want, version, identity, error)
            return
        except Exception as error:
            log.exception("model %s: version %s could not be loaded", slot.name, version)
            self._failed(want, version, identity, ModelRejected(f"internal error: {type(error).__name__}; the log tells more"))
            return
        self._backoff.forget(version)
        replaced = slot.versions.get(version)
        slot.versions[version] = loaded
        self._swap(loaded, want, monotonic() - began)
        if replaced is not None:
            self._later(self._stop_engine(replaced))

    async def _runs_as_told(self, loaded: Loaded, want: ModelState, found: FoundModel) -> bool:
        """Whether a loaded version is run as model.yaml says now; where it can, the live runner takes what changed."""
        config, before = found.config or ModelConfig(), loaded.settings
        if runs_as_told(loaded, config):
            return True
        taken = await takes_live(loaded, want, found, config, self._admission)
        if taken and loaded.settings != before and loaded is self.slot.active:
            self._activated(loaded, want, 0.0, loaded)
        return taken

    async def _follow_model_yaml(self, want: ModelState, found: FoundModel) -> None:
        """Versions beside the active one that cannot take live what changed go, and come back where somebody needs them."""
        slot = self.slot
        for loaded in [one for one in slot.versions.values() if one is not slot.active]:
            if await self._runs_as_told(loaded, want, found):
                continue
            await self._stop(loaded)
            if loaded.pinned and loaded.version in slot.known:
                await self._warm(want, found, loaded.version)
                if (again := slot.versions.get(loaded.version)) is not None:
                    again.pinned = True

    async def _share(self, want: ModelState, found: FoundModel) -> None:
        """Load the versions that the journal wants beside the desired one, and give the one on trial its share of the requests."""
        slot, split = self.slot, want.split
        beside = [*((split.version,) if split is not None else ()), *(want.rungs if slot.config.ladder else ())]
        for version in beside:
            if version not in slot.versions and version in slot.known:
                await self._warm(want, found, version)
        if split is None or slot.active is None or slot.active.version != want.desired:
            slot.split = None
            return
        loaded = slot.versions.get(split.version)
        if loaded is None or not asked_alike(loaded, slot.active):
            slot.split = None
        elif slot.split is None or (slot.split.loaded, slot.split.share, slot.split.stage) != (loaded, split.share, split.stage):
            slot.split = Share(loaded, split.share, split.stage)

    async def _warm(self, want: ModelState, found: FoundModel, version: str) -> None:
        """Load a version beside the active one, where memory allows: golden answers under /versions too. The desired one is reached for, not warmed."""
        identity = (want.golden_sha256, self.slot.config, found.beside, want.split)
        if version == want.desired or self._warm_backoff.blocked(version, identity):
            return
        if deaths := self._past.took_all_down(self.slot.name, version):
            self.slot.does_not_load(version, f"the whole server died with it {deaths} times in five minutes")
            return
        try:
            self.slot.versions[version] = await self._load(want, found, version)
        except HoneError as error:
            self._warm_backoff.failed(version, identity, want.generation.n)
            self.slot.does_not_load(version, self._told(str(error)), isinstance(error, InsufficientStorage))
            log.warning("model %s: version %s is not kept warm: %s", self.slot.name, version, error)

    async def _load(self, want: ModelState, found: FoundModel, version: str, serves: bool = False) -> Loaded:
        """`serves`: it is about to be the active one, so what surrounds it must be there."""
        slot = self.slot
        slot.loading = version
        if slot.active is None:
            slot.reason = f"version {version} is loading"
        began = monotonic()
        try:
            admitted = await self._admission.admit(found, want, version)
            settings = want.settings_of(version) or admitted.settings
            known = self._prepared is not None and self._prepared[0] == admitted.golden_sha256
            processor = await self._admission.processor(found, admitted) if serves and not known else None
            loaded = await self._loader.load(admitted, settings, want.generation.n, found.config or ModelConfig())
            if processor is not None:
                try:
                    await self._surround(found, admitted, processor)
                except BaseException:
                    await self._loader.stop(loaded, 0.0)
                    raise
        finally:
            slot.loading = ""
        slot.failed.pop(version, None)
        loaded.took_s = monotonic() - began
        self._metrics.time("hone_model_load_duration_seconds", slot.name, seconds=loaded.took_s)
        return loaded

    async def _follow_processing(self, found: FoundModel, admitted: Admitted) -> None:
        """What model.yaml, or a file that it names, says otherwise now; where that does not fit the model, what was there goes on and it is told."""
        key = _surroundings(found, admitted)
        if key in (self._prepared, self._unfit):
            return
        try:
            await self._surround(found, admitted, await self._admission.processor(found, admitted))
        except HoneError as error:
            self._unfit, self.slot.misfit = key, self._told(str(error))
            log.warning("model %s goes on as it was: %s", self.slot.name, self.slot.misfit)

    async def _surround(self, found: FoundModel, admitted: Admitted, processor: Processor) -> None:
        """What surrounds the model for this golden and this model.yaml: pre- and post-processing, and the reservoir of live inputs."""
        slot, config = self.slot, found.config or ModelConfig()
        classifies = config.task == "classification"
        await asyncio.to_thread(slot.reservoir.configure, config.capture, admitted.signature, classifies, admitted.golden_sha256)
        slot.processor = processor
        slot.mirror = Mirror(*config.quality.resolved(config.task), usual=usual_classes(admitted, classifies))
        self._prepared, self._unfit, slot.misfit = _surroundings(found, admitted), None, ""

    def _swap(self, new: Loaded, want: ModelState, took_s: float) -> None:
        """The pointer's change: from here on new requests go to `new`, and the old one answers what it has."""
        slot, old = self.slot, self.slot.active
        new.generation, new.warm_until = want.generation.n, 0.0
        slot.active, slot.reason = new, ""
        if slot.split is not None and slot.split.loaded is new:
            slot.split = None
        self._loader.ranked(slot.active, active=True)
        if old is not None and old is not new:
            if old.version != new.version:
                old.warm_until = monotonic() + slot.config.rollback_window_s
                self._loader.ranked(old, active=False)
            self._later(self._watch_drain(old))
        self._activated(new, want, took_s, old)
        self._later(self._bound_warm(want))

    def _activated(self, loaded: Loaded, want: ModelState, took_s: float, old: Loaded | None = None) -> None:
        outcome = "activated" if old is None else "swapped" if old is not loaded and old.version != loaded.version else "settings"
        self._metrics.count("hone_swaps", self.slot.name, outcome)
        self._metrics.gauge("hone_swap_timestamp_seconds", self.slot.name, value=time())
        data = {
            "version": loaded.version, "generation": want.generation.n, "took_s": round(took_s, 4), "replica": self._loader.replica,
            "host_class": self._loader.host_class, "notes": list(loaded.notes), "from": old.version if old else "",
        }  # fmt: skip
        self._record(Event("version.activated", self.slot.name, loaded.version, data=data))
        log.info("model %s: version %s answers, %.1f s after it was asked for", self.slot.name, loaded.version, took_s)

    def _failed(self, want: ModelState, version: str, identity: object, error: HoneError) -> None:
        self.slot.does_not_load(version, reason := self._told(str(error)), isinstance(error, InsufficientStorage))
        if self.slot.active is None:
            self.slot.reason = self._unserved or f"version {version} does not load: {reason}"
        count = self._backoff.failed(version, identity, want.generation.n)
        self._metrics.count("hone_swaps", self.slot.name, "failed")
        log.warning("model %s: version %s does not load (%d): %s", self.slot.name, version, count, error)
        if count == 1:
            data = {"version": version, "reason": str(error), "where": self._loader.host_class, "replica": self._loader.replica}
            self._record(Event("version.failed", self.slot.name, version, data=data))

    def _leave_deadly(self, active: Loaded, want: ModelState) -> None:
        """A built version that several different inputs killed goes; golden is never marked failed, its runner only backs off."""
        if active.version == want.golden or active.engine.distinct_killers < DEADLY_INPUTS or active.version != want.desired:
            return
        if self._leave(want, f"{active.engine.distinct_killers} different inputs killed its runner"):
            active.engine.killers.clear()  # whoever wants it again gives it another chance; the inputs stay refused

    def _bearable(self, want: ModelState) -> str:
        """The version to reach: the desired one, unless the server died with it again and again (see PastDeaths)."""
        slot = self.slot
        if slot.active is not None:
            return want.desired
        version, why = self._past.bearable(slot.name, want.desired, _before(want), len(self._service.slots) > 1)
        if version and why:
            self._leave(want, why)
        elif why:
            slot.reason = f"{why}; it is loaded again when that is over, or at once with: hone load {slot.name}:{want.desired}"
        return version

    def _leave(self, want: ModelState, reason: str) -> bool:
        """Have the version before take the place of the desired one, for its faults; False where that was told already."""
        version, back = want.desired, _before(want)
        if self._left_deadly == (version, want.generation):
            return False  # told, but the store has not taken it yet
        self._left_deadly = version, want.generation
        self.slot.does_not_load(version, reason)
        self._record(Event("version.failed", self.slot.name, version, data={"version": version, "reason": reason}))
        data = {"version": back, "from": version, "golden_sha256": want.golden_sha256, "reason": reason, "fault": True}
        self._record(Event("desired.changed", self.slot.name, back, data=data))
        self._metrics.count("hone_rollbacks", self.slot.name, "killers")
        return True

    # ---- versions that go
    async def _bound_warm(self, want: ModelState) -> None:
        """One previous version at most, and no more versions than model.yaml's runtime.warm_versions."""
        await asyncio.gather(*(self._stop(loaded) for loaded in surplus(self.slot, want)))

    async def _watch_drain(self, old: Loaded) -> None:
        began = monotonic()
        await old.engine.idle(DRAIN_S)
        self._metrics.time("hone_swap_duration_seconds", self.slot.name, seconds=monotonic() - began)

    async def _stop(self, loaded: Loaded) -> None:
        self.slot.let_go(loaded)
        await self._stop_engine(loaded)

    async def _stop_engine(self, loaded: Loaded) -> None:
        loaded.state = VersionState.UNLOADING
        await self._loader.stop(loaded, DRAIN_S)

    def _later(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
