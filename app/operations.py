"""The admin side's operations on a running server: reads what fleet, journal and cards know, and turns requests into commands.

It speaks JSON-able facts; HTTP is app.api.admin's, decisions are app.control.commands', files are the repository's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Final

from starlette.requests import Request

from app import __version__
from app.api.bodies import parts_of
from app.api.upload_form import receive_form
from app.catalog import durable
from app.catalog.card_facts import signature_of
from app.catalog.cards import BuiltCard, Card, Cards, GoldenCard, Proof
from app.catalog.deploy import deploy, remove
from app.catalog.model_config import FILE_NAME, ModelConfig, parse_model_config
from app.catalog.model_names import check_name, printable
from app.catalog.processing import Processor
from app.catalog.repository import FoundModel, Repository
from app.catalog.state_folder import StateFolder
from app.catalog.uploads import Staged, stage_upload
from app.control.choices import quick_tries
from app.control.commands import Commands
from app.control.loop import Loop
from app.control.steps import parse_tries
from app.domain import JSON, Event, Job, JobState, Mode, ModelState, RuntimeSettings
from app.errors import Conflict, InvalidRequest, ModelRejected, NotAllowed, NotFound, NotReady, PayloadTooLarge
from app.serving.admission import Admission
from app.serving.fleet import Fleet
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Slot
from app.settings import Settings
from app.store.base import Journal
from app.store.codec import settings_from_json
from optimizers.plot import curves_svg

EXPLAINING: Final = frozenset({
    "model.deployed", "desired.changed", "settings.changed", "version.failed", "version.confirmed", "canary.ended", "suspicion.raised",
    "diagnosis.made", "plan.made", "runner.restarted", "recovery.verified", "job.finished", "ladder.stepped", "version.verified",
})  # fmt: skip
"""Events that say why a model is served as it is."""
STORY: Final = 30
LOAD_WAIT_S: Final = 120.0
"""How long a load call waits for the model to answer; loading goes on after that."""
UNLOAD_WAIT_S: Final = 60.0


class ServerOperations:
    """Everything that a person may see or ask for. Blocking work runs in threads."""

    def __init__(
        self, settings: Settings, service: InferenceService, fleet: Fleet, admission: Admission, commands: Commands, journal: Journal,
        repository: Repository, state: StateFolder, cards: Cards, loop: Loop, host: JSON,
    ) -> None:  # fmt: skip
        self._settings, self._service, self._fleet, self._admission = settings, service, fleet, admission
        self._commands, self._journal, self._repository, self._state, self._cards = commands, journal, repository, state, cards
        self._loop, self._host = loop, host
        self._started = monotonic()

    # ---- reading
    def status(self) -> JSON:
        workers = [value for key, value in self._fleet.board.items() if key.startswith("worker:")]
        return {
            "version": __version__,
            "ready": self._fleet.ready,
            "uptime_s": round(monotonic() - self._started, 1),
            "host": self._host | {"now": self._loop.host.to_json()},
            "frozen": self._fleet.state.frozen,
            "frozen_because": self._fleet.state.frozen_because,
            "store_error": self._fleet.store_error,
            "repository_error": self._fleet.repository_error,
            "warnings": self._fleet.warnings,
            "workers": workers,
            "models": self.models(),
            "jobs": self.jobs("", True),
        }

    def models(self) -> list[JSON]:
        return [self._model(slot) for slot in sorted(self._service.slots.values(), key=lambda slot: slot.name)]

    def model(self, name: str) -> JSON:
        slot = self._service.slot(name)
        return self._model(slot) | {
            "objective": slot.config.objective.model_dump(exclude_none=True),
            "description": slot.config.description,
            "jobs": self.jobs(name, False)[:20],
        }

    async def versions(self, name: str) -> list[JSON]:
        """Lineage: golden first, then what was built from it, each with fidelity and speed as proven on this class of host."""
        slot = self._service.slot(name)
        want = self._fleet.state.models.get(name)
        if want is None:
            return []
        return await asyncio.to_thread(self._lineage, slot, want)

    def jobs(self, model: str, open_only: bool) -> list[JSON]:
        jobs = sorted(self._fleet.state.jobs.values(), key=lambda job: job.requested_at, reverse=True)
        chosen = [j for j in jobs if model in ("", j.model) and not (open_only and j.state is JobState.FINISHED)]
        return [self._job(job) for job in chosen]

    def job(self, identity: str) -> JSON:
        job = self._fleet.state.jobs.get(identity)
        if job is None:
            raise NotFound(f"no job {identity!r}; GET /admin/jobs lists them")
        return self._job(job) | {"report": job.report}

    async def timeline(self, model: str, after: int, limit: int, newest_first: bool) -> list[JSON]:
        events = await asyncio.to_thread(self._journal.read, after, limit, model, newest_first)
        return [asdict(event) for event in events]

    async def explain(self, name: str) -> JSON:
        """Why the active version is the active one: its lineage, proof, what led to it, and what is wrong now."""
        slot = self._service.slot(name)
        lineage = {one["version"]: one for one in await self.versions(name)}
        events = await asyncio.to_thread(self._journal.read, 0, 400, name, True)
        chain: list[JSON] = []
        version = slot.active.version if slot.active is not None else slot.desired
        while version and version in lineage and version not in [one["version"] for one in chain]:
            chain.append(lineage[version])
            version = lineage[version]["parent"]
        told = [asdict(event) for event in reversed(events) if event.kind in EXPLAINING]
        return self._model(slot) | {"lineage": chain, "story": told[-STORY:]}

    async def curves(self, name: str, version: str) -> str:
        """A picture of what each layer costs when it alone is cut (SVG), where a method that built `version` measured that. Raises NotFound."""
        self._service.slot(name)
        card = await asyncio.to_thread(self._cards.card, name, version)
        steps = card.draft.facts if isinstance(card, BuiltCard) else ()
        measured = next((step for step in steps if step.get("curves")), None)
        if measured is None:
            raise NotFound(
                f"no step that built version {version!r} of {name!r} cut layers one by one; sensitivity-pruning does, and rank=sensitivity"
            )
        return curves_svg(measured["curves"], f"{name}:{version}, {measured['method']}: each layer cut alone")

    async def news(self, after: int, timeout_s: float) -> int | None:
        return await self._fleet.news(after, timeout_s)

    # ---- changing
    async def optimize(
        self, name: str, tries: Sequence[Sequence[str | JSON]] | None, reason: str, promote: str, target: str, actor: str
    ) -> JSON:  # fmt: skip
        slot = self._service.slot(name)
        wanted = tries if tries is not None else quick_tries(slot.config)
        steps = await asyncio.to_thread(parse_tries, wanted, slot.config.allow, name, target)
        job = await self._do(self._commands.optimize, name, steps, reason, promote, actor)
        return self._job(job)

    async def verify(self, name: str, version: str | None, reason: str, actor: str) -> JSON:
        model = await asyncio.to_thread(self._commands.model, name)
        chosen = version or model.desired
        if chosen != model.golden:
            await asyncio.to_thread(self._commands.built, model, chosen)
        job = await self._do(self._commands.optimize, name, [[{"method": "verify", "version": chosen}]], reason, "manual", actor)
        return self._job(job)

    async def promote(self, name: str, version: str, reason: str, force: bool, actor: str) -> JSON:
        slot = self._service.slot(name)
        if version.isdigit() and version not in slot.known:
            raise NotFound(f"model {name!r} has no version {version!r}; it has {', '.join(slot.known) or 'none'}")
        self._fleet.reconciler(name).try_again(version)
        event = await self._do(self._commands.promote, name, version, actor, reason, force)
        return await self._reached(name, event)

    async def rollback(self, name: str, reason: str, actor: str) -> JSON:
        event = await self._do(self._commands.rollback, name, actor, reason)
        return await self._reached(name, event)

    async def settings(self, name: str, changes: Mapping[str, int], reason: str, actor: str) -> JSON:
        loaded = self._service.loaded(name, None)
        settings = settings_from_json({**asdict(loaded.settings), **changes})
        self._check_settings(loaded, settings, changes)
        event = await self._do(self._commands.change_settings, name, settings, actor, reason, loaded.settings)
        return await self._reached(name, event)

    async def set_mode(self, name: str, mode: Mode, actor: str) -> JSON:
        await self._do(self._commands.set_mode, name, mode, actor)
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
        if mode is Mode.AUTO and slot.config.ladder:
            raise Conflict(
                f"the loop keeps the ladder of {name!r} in auto mode, and would undo this: take another mode (hone mode {name} approve), "
                "or say ladder: false in its model.yaml"
            )
        await self._do(self._commands.set_ladder, name, rungs, actor)
        return {"model": name, "rungs": list(rungs)}

    async def freeze(self, frozen: bool, actor: str) -> JSON:
        await self._do(self._commands.freeze, frozen, actor)
        return {"frozen": frozen}

    async def cancel(self, identity: str, actor: str) -> JSON:
        return self._job(await self._do(self._commands.cancel, identity, actor))

    async def clear_capture(self, name: str, actor: str) -> JSON:
        slot = self._service.slot(name)
        deleted = await asyncio.to_thread(slot.reservoir.clear)
        await asyncio.to_thread(self._journal.append, Event("capture.cleared", name, actor=actor, data={"deleted": deleted}))
        return {"model": name, "deleted": deleted}

    async def remove_version(self, name: str, version: str, actor: str) -> JSON:
        await self._do(self._commands.forget_version, name, version, actor)
        await self._fleet.settle(name, lambda slot: version not in slot.versions, 30.0)
        await asyncio.to_thread(self._cards.remove_weights, name, version)
        return {"model": name, "version": version, "removed": True}

    async def remove_model(self, name: str, actor: str) -> JSON:
        with self._fleet.removing(name):
            await asyncio.to_thread(remove, self._repository, name)
            await self._do(self._commands.forget_model, name, actor)
        self._fleet.poke(scan=True)
        await asyncio.to_thread(self._cards.remove_model, name)
        return {"model": name, "removed": True}

    async def load_version(self, name: str, version: str, actor: str) -> JSON:
        loaded = await self._fleet.reconciler(name).load_version(version)
        await asyncio.to_thread(self._journal.append, Event("version.loaded", name, version, actor=actor, data={"version": version}))
        return _loaded(loaded)

    async def upload(self, request: Request, actor: str) -> JSON:
        """Receive a model as a form, check it fully in a task child, and only then put it into the repository."""
        if not self._settings.allow_uploads:
            raise NotAllowed("uploads are switched off here (HONE_ALLOW_UPLOADS=false); put the model into the repository folder")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._settings.max_upload_bytes:
            raise PayloadTooLarge(
                f"the upload has {length} bytes; at most {self._settings.max_upload_bytes} are taken (HONE_MAX_UPLOAD_BYTES)"
            )
        with durable.storage_errors("receiving an upload", self._state.staging):
            if length.isdigit():
                await asyncio.to_thread(durable.require_space, self._state.staging, int(length), "receiving an upload")
            with durable.temporary_folder(self._state.staging, 0o700) as folder:
                form = await receive_form(
                    request.headers.get("content-type", ""), parts_of(request), folder, self._settings.max_upload_bytes, _check_field
                )
                if "name" not in form.fields:
                    raise InvalidRequest("the form needs a field `name`: the name of the model, such as -F name=resnet")
                return await self.deploy_files(form.fields["name"], form.files, actor)

    async def deploy_files(self, name: str, files: Mapping[str, Path], actor: str) -> JSON:
        with await asyncio.to_thread(stage_upload, self._state, files, self._repository) as staged:
            data_files = staged.data_files
            if staged.model.suffix != ".safetensors":
                file = staged.model
                if file.suffix == ".packed":
                    file = staged.folder / f"{file.name}.onnx"
                    await self._admission.unpack(staged.model, file)
                report = await self._admission.inspect({"path": str(file), "rows": "auto"})
                data_files = tuple(name for name in report["files"] if name != file.name)
                await asyncio.to_thread(self._check_processing, name, staged, report)
            known = self._fleet.state.models.get(name)
            taken = [known.golden] if known is not None else []
            with self._fleet.deploying(name):
                found = await asyncio.to_thread(deploy, self._repository, staged.model, name, staged.config, data_files, taken)
                await self._announce(found, actor)
            unused = sorted({*staged.data_files} - {*data_files})
        notes = [f"{printable(file)} was not kept: the model names no such data file" for file in unused]
        return await self.serve_found(found, notes)

    def _check_processing(self, name: str, staged: Staged, report: Mapping[str, Any]) -> None:
        """Pre- and post-processing of model.yaml (the uploaded one, else what lies there) must fit what the model takes and gives."""
        deployed = self._repository.root / name
        if staged.config is not None:
            config = parse_model_config(staged.config, Path(FILE_NAME))
        elif (deployed / FILE_NAME).exists():
            config = self._repository.find(name).config or ModelConfig()
        else:
            return
        for folder in (staged.folder, deployed):
            if all((folder / side).exists() for side in config.side_files):
                Processor(signature_of(report), config.preprocess, config.postprocess, folder, config.task)
                return

    async def _announce(self, found: FoundModel, actor: str) -> None:
        """Tell the journal who deployed it; what is golden already is not told again."""
        golden = found.golden
        if golden is None or golden.error:
            return
        sha256 = await asyncio.to_thread(self._repository.sha256, golden)
        known = (await asyncio.to_thread(self._journal.state)).models.get(found.name)
        if known is None or (known.golden, known.golden_sha256) != (golden.number, sha256):
            data = {"golden": golden.number, "sha256": sha256, "replaces": known.golden if known else ""}
            await asyncio.to_thread(self._journal.append, Event("model.deployed", found.name, golden.number, actor=actor, data=data))

    async def serve_found(self, found: FoundModel, notes: Sequence[str] = ()) -> JSON:
        """Wait, bounded, until the newest version of `found` answers, and say how it went."""
        number = found.versions[-1].number
        if found.error:
            raise ModelRejected(f"{found.name}:{number} is in the repository but cannot be served: {found.error}")
        if found.name in self._service.slots:
            self._fleet.reconciler(found.name).try_again(number)
        self._fleet.poke(scan=True)
        ready = await self._fleet.settle(
            found.name, lambda slot: number in slot.versions or number in slot.failed, LOAD_WAIT_S
        )  # fmt: skip
        slot = self._service.slots.get(found.name)
        if slot is not None and number in slot.failed:
            raise ModelRejected(f"{found.name}:{number} is in the repository but does not load: {slot.failed[number]}")
        return {"model": found.name, "version": number, "ready": ready, "notes": [*found.notes, *notes]}

    # ---- the protocol's repository extension
    async def load(self, model: str, files: Mapping[str, bytes], actor: str) -> None:
        if files:
            await self._load_files(model, files, actor)
        await self._fleet.rescan()
        if model not in self._fleet.state.models:
            broken = self._service.slots.get(model)
            if broken is not None:
                raise ModelRejected(f"model {model!r} does not load: {broken.reason}")
            raise NotFound(f"no model {model!r} in the repository; put it into {model}/1/model.onnx, or upload it with POST /admin/models")
        reconciler, want = self._fleet.reconciler(model), self._fleet.state.models[model]
        for version in (want.desired, want.golden):
            reconciler.try_again(version)
        await self._do(self._commands.set_loaded, model, True, actor)
        want = self._fleet.state.models.get(model, want)

        def done(slot: Slot) -> bool:  # golden answers where the desired one does not load
            refused = all(reconciler.refuses(v, want.generation.n) for v in (want.desired, want.golden))
            return slot.active is not None or refused or self._fleet.unloaded(model)

        await self._fleet.settle(model, done, LOAD_WAIT_S)
        slot = self._service.slot(model)
        if self._fleet.unloaded(model):
            raise Conflict(f"model {model!r} was unloaded by somebody else while it was loading")
        if slot.active is None:
            raise NotReady(f"model {model!r} is not ready: {slot.reason}")

    async def unload(self, model: str, actor: str) -> None:
        slot = self._service.slot(model)
        await self._do(self._commands.set_loaded, model, False, actor)

        def done(slot: Slot) -> bool:
            return (slot.unloaded and not slot.versions) or not self._fleet.unloaded(model)

        gone = await self._fleet.settle(model, done, UNLOAD_WAIT_S)
        if model in self._fleet.state.models and not self._fleet.unloaded(model):
            raise Conflict(f"model {model!r} was loaded by somebody else while it was leaving")
        if not gone and model in self._service.slots:
            left = ", ".join(f"version {one.version} ({one.engine.inflight} requests)" for one in slot.versions.values())
            raise NotReady(
                f"model {model!r} takes no requests any more, but is not gone after {UNLOAD_WAIT_S:.0f} s: {left or 'a load'} must end first"
            )

    async def _load_files(self, model: str, files: Mapping[str, bytes], actor: str) -> None:
        with (
            durable.storage_errors("receiving files of a load", self._state.staging),
            durable.temporary_folder(self._state.staging, 0o700) as folder,
        ):
            paths: dict[str, Path] = {}
            for number, (name, content) in enumerate(files.items()):
                plain = name.rpartition("/")[2]
                if plain in paths:
                    raise InvalidRequest(
                        f"two files of this load are called {printable(plain)}; it deploys one version, so send each name once"
                    )
                path = folder / f"{number}.part"
                await asyncio.to_thread(path.write_bytes, content)
                paths[plain] = path
            await self.deploy_files(model, paths, actor)

    # ---- inside
    async def _do(self, command: Any, *arguments: Any) -> Any:
        """Run one blocking command, then let the fleet look at what it changed."""
        result = await asyncio.to_thread(command, *arguments)
        await self._fleet.refresh()
        self._fleet.poke()
        return result

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
        return self._model(slot)

    def _check_settings(self, loaded: Loaded, settings: RuntimeSettings, changes: Mapping[str, int]) -> None:
        """What is changed must make sense here; what model.yaml or a proof says otherwise is theirs to say."""
        cores = int(self._host["cores"])
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

    def _model(self, slot: Slot) -> JSON:
        want = self._fleet.state.models.get(slot.name)
        active = slot.active
        state = "unloaded" if slot.unloaded else "ready" if slot.ready else "loading" if slot.loading else "unavailable"
        return {
            "name": slot.name,
            "state": state,
            "reason": slot.trouble if state == "ready" else slot.reason,
            "task": slot.config.task,
            "mode": (want.mode if want is not None and want.mode is not None else slot.config.mode).value,
            "golden": slot.golden,
            "desired": want.desired if want is not None else slot.desired,
            "active": active.version if active else "",
            "previous": want.previous if want is not None else "",
            "generation": active.generation if active else 0,
            "settings": asdict(active.settings) if active else {},
            "loaded": [_loaded(loaded) for loaded in slot.versions.values()],
            "failed": dict(slot.failed),
            "captured": len(slot.reservoir),
            "split": asdict(want.split) if want is not None and want.split is not None else None,
            "rungs": list(want.rungs) if want is not None else [],
            "stepped_down_to": slot.rung.version if slot.rung is not None else "",
            "loop": self._loop.told(slot.name),
            "last_event": want.last_event if want is not None else 0,
            "latest": self._fleet.latest.get(slot.name),
        }

    def _job(self, job: Job) -> JSON:
        said = asdict(job)
        del said["report"]
        progress = self._fleet.board.get(f"job:{job.id}")
        return said | {"state": job.state.value, "progress": progress if job.state is not JobState.FINISHED else None}

    def _lineage(self, slot: Slot, want: ModelState) -> list[JSON]:
        cards: list[Card] = []
        golden = self._cards.golden(want.name, want.golden)
        if golden is not None:
            cards.append(golden)
        cards += self._cards.built(want.name)
        return [self._version(slot, want, card) for card in cards]

    def _version(self, slot: Slot, want: ModelState, card: Card) -> JSON:
        proof = self._cards.proof(card, want.golden_sha256, str(self._host["host_class"]))
        state, reason = slot.state_of(card.version)
        built = isinstance(card, BuiltCard)
        known = next((b for b in want.built if b.version == card.version), None)
        return {
            "version": card.version,
            "golden": not built,
            "parent": card.draft.parent if isinstance(card, BuiltCard) else "",
            "recipe": [step.get("method") for step in card.draft.recipe] if isinstance(card, BuiltCard) else [],
            "why": card.draft.why if isinstance(card, BuiltCard) else "deployed",
            "job": card.draft.job if isinstance(card, BuiltCard) else "",
            "bytes": card.bytes,
            "sha256": card.sha256,
            "state": "REMOVED" if known is not None and known.removed else state.value,
            "reason": reason,
            "active": slot.active is not None and slot.active.version == card.version,
            "stale": isinstance(card, BuiltCard) and card.draft.golden_sha256 != want.golden_sha256,
            "batching": card.rows.reason,
            "notes": _found_at_deploy(card),
            "proof": _proof(proof),
            "proven_on": [p.host_class for p in self._cards.proofs(card, want.golden_sha256)],
        }


def _check_field(name: str, value: str) -> None:
    """A name that may not be is refused before the files are read."""
    if name == "name":
        check_name(value)
    else:
        raise InvalidRequest(f"the form has a field {name[:80]!r}; an upload takes `name`, and files (-F model.onnx=@model.onnx)")


def _found_at_deploy(card: Card) -> list[str]:
    """What the inspection of a golden has to tell people: weights that are listed as inputs, graph levels that compute something else."""
    if not isinstance(card, GoldenCard):
        return []
    serving = card.facts.get("serving") or {}
    level = [f"served at graph level {serving['graph_level']}: {serving['reason']}"] if serving.get("graph_level", "all") != "all" else []
    return [*(str(note) for note in card.facts.get("notes") or ()), *level]


def _loaded(loaded: Loaded) -> JSON:
    engine = loaded.engine
    return {
        "version": loaded.version,
        "state": loaded.state.value,
        "generation": loaded.generation,
        "alive": engine.alive,
        "pid": engine.pid,
        "queued": engine.queued,
        "inflight": engine.inflight,
        "memory_bytes": loaded.memory_bytes,
        "load_s": round(loaded.took_s, 3),
        "pinned": loaded.pinned,
        "notes": list(loaded.notes),
        "batching": loaded.admitted.signature.batchable,
    }


def _proof(proof: Proof | None) -> JSON | None:
    if proof is None:
        return None
    return {
        "host_class": proof.host_class,
        "verdict": proof.verdict.value,
        "summary": proof.summary,
        "fidelity": proof.fidelity,
        "latency": proof.latency.get("latency") or {},
        "capacity": proof.latency.get("capacity") or {},
        "settings": asdict(proof.settings) if proof.settings else None,
        "quietness": proof.quietness,
        "measured_at": proof.measured_at,
    }
