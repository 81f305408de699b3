"""What may be asked of a running server on the admin side: each operation turns a request into a command and waits, bounded, for what it leads to.

What there is to see is app.views'; HTTP is app.api.admin's, decisions are app.control.commands', files that come in are app.deployment's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from app.catalog.cards import Cards
from app.catalog.deploy import remove
from app.catalog.repository import Repository
from app.control.choices import quick_tries
from app.control.commands import Commands
from app.control.steps import parse_tries
from app.deployment import LOAD_WAIT_S
from app.domain import JSON, Event, Mode, RuntimeSettings
from app.errors import Conflict, InvalidRequest, NotFound
from app.serving.fleet import Fleet
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Slot
from app.store.base import Journal
from app.store.codec import settings_from_json
from app.views import ServerViews, loaded_facts


class ServerOperations:
    """Everything that a person may ask for. Blocking work runs in threads."""

    def __init__(
        self, service: InferenceService, fleet: Fleet, commands: Commands, journal: Journal, repository: Repository, cards: Cards,
        views: ServerViews, cores: int,
    ) -> None:  # fmt: skip
        self._service, self._fleet, self._commands, self._journal = service, fleet, commands, journal
        self._repository, self._cards, self._views, self._cores = repository, cards, views, cores

    async def optimize(
        self, name: str, tries: Sequence[Sequence[str | JSON]] | None, reason: str, promote: str, target: str, actor: str
    ) -> JSON:  # fmt: skip
        slot = await self._with_a_golden(name)
        torch = slot.golden_kind == "torch"
        wanted = tries if tries is not None else quick_tries(slot.config, torch)
        steps = await asyncio.to_thread(parse_tries, wanted, slot.config.allow, name, target, torch=torch)
        job = await self._fleet.carry_out(self._commands.optimize, name, steps, reason, promote, actor)
        return self._views.job_facts(job)

    async def verify(self, name: str, version: str | None, reason: str, actor: str) -> JSON:
        await self._with_a_golden(name)
        model = await asyncio.to_thread(self._commands.model, name)
        chosen = version or model.desired
        if chosen != model.golden:
            await asyncio.to_thread(self._commands.built, model, chosen)
        job = await self._fleet.carry_out(
            self._commands.optimize, name, [[{"method": "verify", "version": chosen}]], reason, "manual", actor
        )
        return self._views.job_facts(job)

    async def promote(self, name: str, version: str, reason: str, force: bool, actor: str) -> JSON:
        slot = self._service.slot(name)
        if version.isdigit() and version not in slot.known:
            raise NotFound(f"model {name!r} has no version {version!r}; it has {', '.join(slot.known) or 'none'}")
        self._fleet.reconciler(name).try_again(version)
        event = await self._fleet.carry_out(self._commands.promote, name, version, actor, reason, force)
        return await self._reached(name, event)

    async def rollback(self, name: str, reason: str, actor: str) -> JSON:
        event = await self._fleet.carry_out(self._commands.rollback, name, actor, reason)
        return await self._reached(name, event)

    async def settings(self, name: str, changes: Mapping[str, int], reason: str, actor: str) -> JSON:
        loaded = self._service.loaded(name, None)
        settings = settings_from_json({**asdict(loaded.settings), **changes})
        self._check_settings(loaded, settings, changes)
        slot = self._service.slot(name)
        if settings == loaded.settings and loaded.version == slot.desired:
            return self._views.slot_facts(slot)  # as it is: nothing that a rollback would have to undo
        event = await self._fleet.carry_out(self._commands.change_settings, name, settings, actor, reason, loaded.settings)
        return await self._reached(name, event)

    async def set_mode(self, name: str, mode: Mode, actor: str) -> JSON:
        await self._fleet.carry_out(self._commands.set_mode, name, mode, actor)
        return {"model": name, "mode": mode.value}

    async def set_ladder(self, name: str, rungs: Sequence[str], actor: str) -> JSON:
        slot = self._service.slot(name)
        for version in rungs:
            if version not in slot.known:
                raise NotFound(f"model {name!r} has no version {version!r}; it has {', '.join(slot.known) or 'none'}")
            if version == slot.desired:
                raise InvalidRequest(f"version {version} answers anyway; name versions that may answer in its place")
        want = self._fleet.state.models.get(name)
        mode = want.mode if want is not None and want.mode is not None else slot.config.mode
        if not slot.config.ladder:
            raise Conflict(f"model.yaml of {name!r} says ladder: false, so no version answers in another's place: take that line out first")
        if mode is not Mode.APPROVE:
            why = "the loop keeps its ladder, and would undo this" if mode is Mode.AUTO else "nothing steps down, whatever its ladder"
            raise Conflict(f"in {mode.value} mode of {name!r} {why}: hone mode {name} approve")
        await self._fleet.carry_out(self._commands.set_ladder, name, rungs, actor)
        return {"model": name, "rungs": list(rungs)}

    async def freeze(self, frozen: bool, actor: str) -> JSON:
        await self._fleet.carry_out(self._commands.freeze, frozen, actor)
        return {"frozen": frozen}

    async def cancel(self, identity: str, actor: str) -> JSON:
        return self._views.job_facts(await self._fleet.carry_out(self._commands.cancel, identity, actor))

    async def clear_capture(self, name: str, actor: str) -> JSON:
        slot = self._service.slot(name)
        deleted = await asyncio.to_thread(slot.reservoir.clear)
        await asyncio.to_thread(self._journal.append, Event("capture.cleared", name, actor=actor, data={"deleted": deleted}))
        return {"model": name, "deleted": deleted}

    async def remove_version(self, name: str, version: str, actor: str) -> JSON:
        await self._fleet.carry_out(self._commands.forget_version, name, version, actor)
        await self._fleet.settle(name, lambda slot: version not in slot.versions, 30.0)
        await asyncio.to_thread(self._cards.remove_weights, name, version)
        return {"model": name, "version": version, "removed": True}

    async def remove_model(self, name: str, actor: str) -> JSON:
        with self._fleet.removing(name):
            await asyncio.to_thread(remove, self._repository, name)
            await self._fleet.carry_out(self._commands.forget_model, name, actor)
        self._fleet.poke(scan=True)
        await asyncio.to_thread(self._cards.remove_model, name)
        return {"model": name, "removed": True}

    async def load_version(self, name: str, version: str, actor: str) -> JSON:
        loaded = await self._fleet.reconciler(name).load_version(version)
        await asyncio.to_thread(self._journal.append, Event("version.loaded", name, version, actor=actor, data={"version": version}))
        return loaded_facts(loaded)

    async def _with_a_golden(self, name: str) -> Slot:
        """Raises Conflict where golden never loaded: there is nothing to build from, or to hold a version to."""
        slot = self._service.slot(name)
        if slot.golden in slot.failed and await asyncio.to_thread(self._cards.golden, name, slot.golden) is None:
            raise Conflict(
                f"golden {slot.golden} of {name!r} does not load, so nothing is built from it or proven: {slot.failed[slot.golden]}"
            )
        return slot

    async def _reached(self, name: str, event: Event) -> JSON:
        """Wait, bounded, until the active version is the one now desired, or somebody wants another, or none."""
        reconciler, want = self._fleet.reconciler(name), self._fleet.state.models.get(name)
        version, number = (want.desired, want.generation.n) if want is not None else (event.version, 0)

        def done(slot: Slot) -> bool:
            active = slot.active
            there = active is not None and active.version == version and active.generation >= number
            now = self._fleet.state.models.get(name)
            overtaken = now is None or now.unloaded or (now.generation.n > number and now.desired != version)
            return there or overtaken or reconciler.refuses(version, number)

        await self._fleet.settle(name, done, LOAD_WAIT_S)
        slot = self._service.slot(name)
        if version in slot.failed and (slot.active is None or slot.active.version != version):
            active = slot.active.version if slot.active else "none"
            raise Conflict(f"version {version} of {name!r} does not load: {slot.failed[version]}; version {active} goes on answering")
        return self._views.slot_facts(slot)

    def _check_settings(self, loaded: Loaded, settings: RuntimeSettings, changes: Mapping[str, int]) -> None:
        """What is changed must make sense here; what model.yaml or a proof says otherwise is theirs to say."""
        cores = self._cores
        for name in ("lone_threads", "intra_op_threads"):
            if changes.get(name, 0) > cores:
                raise InvalidRequest(f"{name} is {changes[name]}; this server has {cores} cores")
        most = max(2 * cores, 4)
        if changes.get("instances", 0) > most:
            raise InvalidRequest(f"instances is {settings.instances}; at most {most} make sense with {cores} cores")
        if settings.batch_limit > 1 and not loaded.admitted.signature.batchable:
            raise InvalidRequest(
                f"batch_limit is {settings.batch_limit}, but this model is served unbatched: {loaded.admitted.signature.rows_reason}"
            )
