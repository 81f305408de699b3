"""How a model comes into the repository of a running server and answers there: uploads, and the protocol's load and unload.

An upload is checked fully in a task child before anything lies in the repository; after that it waits, bounded, until the fleet serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request

from app.api.bodies import parts_of
from app.api.upload_form import receive_form
from app.catalog import durable
from app.catalog.card_facts import signature_of
from app.catalog.deploy import deploy
from app.catalog.model_config import CAPTURED, FILE_NAME, ModelConfig, parse_model_config
from app.catalog.model_names import check_name, printable
from app.catalog.processing import Processor
from app.catalog.repository import FoundModel, Repository
from app.catalog.state_folder import StateFolder
from app.catalog.uploads import Staged, stage_upload
from app.control.commands import Commands
from app.domain import JSON, Event
from app.errors import Conflict, InvalidRequest, ModelRejected, NotAllowed, NotFound, NotReady, PayloadTooLarge
from app.serving.admission import Admission
from app.serving.fleet import Fleet
from app.serving.service import InferenceService
from app.serving.slot import Slot
from app.settings import Settings
from app.store.base import Journal

LOAD_WAIT_S: Final = 120.0
"""How long a load call waits for the model to answer; loading goes on after that."""
UNLOAD_WAIT_S: Final = 60.0


class Deployment:
    """Files come in, models come and go. Raises the errors of app.errors; blocking work runs in threads."""

    def __init__(
        self, settings: Settings, service: InferenceService, fleet: Fleet, admission: Admission, commands: Commands, journal: Journal,
        repository: Repository, state: StateFolder,
    ) -> None:  # fmt: skip
        self._settings, self._service, self._fleet, self._admission = settings, service, fleet, admission
        self._commands, self._journal, self._repository, self._state = commands, journal, repository, state

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
        return await self.serve_found(
            found, [*notes, *((*_missing_samples(found), *_missing_weights(found)) if staged.config is not None else ())]
        )

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
        await self._fleet.carry_out(self._commands.set_loaded, model, True, actor)
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
        await self._fleet.carry_out(self._commands.set_loaded, model, False, actor)

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


def _missing_samples(found: FoundModel) -> list[str]:
    """What model.yaml names to judge or build with and is not there: the model serves without, but nothing can be built or proven."""
    named = found.config.samples.model_dump(exclude_none=True) if found.config else {}
    return [
        f"samples.{key} = {name!r} is not there yet: send an .npz in the same upload, or put it into {found.folder}"
        for key, name in named.items()
        if name != CAPTURED and ".py:" not in name and not (found.folder / name).exists()
    ]


def _missing_weights(found: FoundModel) -> list[str]:
    """Of an ONNX model, the PyTorch weights that model.yaml names beside it: an upload brings none."""
    source, newest = found.config and found.config.source, max(found.versions, key=lambda version: int(version.number), default=None)
    if not source or newest is None or newest.kind != "onnx" or (newest.folder / source.weights).is_file():
        return []
    return [f"source.weights = {source.weights!r} is not there: put it into {newest.folder}, else the methods that train do not apply"]


def _check_field(name: str, value: str) -> None:
    """A name that may not be is refused before the files are read."""
    if name == "name":
        check_name(value)
    else:
        raise InvalidRequest(f"the form has a field {name[:80]!r}; an upload takes `name`, and files (-F model.onnx=@model.onnx)")
