"""The admin side: what there is, and what may be asked for. Closed by default; every change records who made it. Translate and call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final, Literal, Protocol

import orjson
from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from app.api.auth import Guard, Role
from app.domain import JSON, Mode
from app.errors import InvalidRequest
from app.store.base import StoreUnavailable


class Asked(BaseModel):
    """Base of all admin bodies: unknown keys are mistakes, and so are values of another kind (true is no 1)."""

    model_config = ConfigDict(extra="forbid", strict=True)


FOLLOWED_AT_ONCE: Final = 1000
AWAY_S: Final = 2.0
Step = str | dict[str, Any]
Recipe = Annotated[list[Step], Field(max_length=32)]


class OptimizeBody(Asked):
    """`recipe`: steps in order; `try`: alternatives, each a recipe; neither: the planner's. A step is a method's name or {"method": …, options}."""

    recipe: Recipe | None = None
    alternatives: Annotated[list[Recipe], Field(max_length=64)] | None = Field(None, alias="try")
    reason: str = Field("asked for", max_length=1000)
    promote: Literal["auto", "manual"] = "auto"
    target: str = Field("", max_length=200)


class PromoteBody(Asked):
    version: str = Field(max_length=64)
    reason: str = Field("asked for", max_length=1000)
    force: bool = False


class ReasonBody(Asked):
    reason: str = Field("asked for", max_length=1000)
    version: str | None = Field(None, max_length=64)


class SettingsBody(Asked):
    """Run-time settings; what is not given stays. They make a new generation, not a new version."""

    batch_limit: int | None = Field(None, ge=1, le=4096)
    instances: int | None = Field(None, ge=1, le=256)
    queue_limit: int | None = Field(None, ge=1, le=1_000_000)
    intra_op_threads: int | None = Field(None, ge=1, le=1024)
    spin_duration_us: int | None = Field(None, ge=0, le=1_000_000)
    lone_threads: int | None = Field(None, ge=0, le=1024)
    reason: str = Field("asked for", max_length=1000)


class LadderBody(Asked):
    rungs: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=8)]


class ModeBody(Asked):
    mode: Annotated[Mode, Field(strict=False)]


class Views(Protocol):
    """What the admin side shows; all answers are JSON-able. Raises the errors of app.errors."""

    def status(self) -> JSON: ...
    def models(self) -> list[JSON]: ...
    def model(self, name: str) -> JSON: ...
    async def versions(self, name: str) -> list[JSON]: ...
    async def explain(self, name: str) -> JSON: ...
    async def curves(self, name: str, version: str) -> str: ...
    def jobs(self, model: str, open_only: bool) -> list[JSON]: ...
    def job(self, identity: str) -> JSON: ...
    async def timeline(self, model: str, after: int, limit: int, newest_first: bool) -> list[JSON]: ...
    async def news(self, after: int, timeout_s: float) -> int | None: ...


class Operations(Protocol):
    """What may be asked for; all answers are JSON-able. Raises the errors of app.errors."""

    async def remove_model(self, name: str, actor: str) -> JSON: ...
    async def remove_version(self, name: str, version: str, actor: str) -> JSON: ...
    async def load_version(self, name: str, version: str, actor: str) -> JSON: ...
    async def optimize(self, name: str, tries: list[list[Step]] | None, reason: str, promote: str, target: str, actor: str) -> JSON: ...
    async def promote(self, name: str, version: str, reason: str, force: bool, actor: str) -> JSON: ...
    async def rollback(self, name: str, reason: str, actor: str) -> JSON: ...
    async def verify(self, name: str, version: str | None, reason: str, actor: str) -> JSON: ...
    async def settings(self, name: str, changes: dict[str, int], reason: str, actor: str) -> JSON: ...
    async def set_mode(self, name: str, mode: Mode, actor: str) -> JSON: ...
    async def set_ladder(self, name: str, rungs: list[str], actor: str) -> JSON: ...
    async def clear_capture(self, name: str, actor: str) -> JSON: ...
    async def freeze(self, frozen: bool, actor: str) -> JSON: ...
    async def cancel(self, identity: str, actor: str) -> JSON: ...


class Uploads(Protocol):
    """Where a model that is sent goes; answers when it serves, or when the wait for that is over. Raises the errors of app.errors."""

    async def upload(self, request: Request, actor: str) -> JSON: ...


def answer(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS), status, media_type="application/json")


class Admin:
    """All admin handlers."""

    def __init__(
        self, views: Views, operations: Operations, uploads: Uploads, guard: Guard, without_paths: Callable[[bytes], bytes] = bytes
    ) -> None:  # fmt: skip
        self._see, self._do, self._uploads, self._guard, self._without_paths = views, operations, uploads, guard, without_paths

    def _show(self, role: Role, content: Any) -> Response:
        """What only reads: a viewer gets it without this server's paths."""
        body = orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)
        return Response(self._without_paths(body) if role is Role.VIEWER else body, media_type="application/json")

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/admin", include_in_schema=False)
        for method, path, handler in (
            ("GET", "/status", self.status), ("GET", "/models", self.models), ("POST", "/models", self.upload),
            ("GET", "/models/{name}", self.model), ("DELETE", "/models/{name}", self.remove_model),
            ("GET", "/models/{name}/explain", self.explain), ("GET", "/models/{name}/versions", self.versions), ("DELETE", "/models/{name}/versions/{version}", self.remove_version),
            ("POST", "/models/{name}/versions/{version}/load", self.load_version), ("GET", "/models/{name}/versions/{version}/curves", self.curves),
            ("POST", "/models/{name}/optimize", self.optimize), ("POST", "/models/{name}/promote", self.promote),
            ("POST", "/models/{name}/rollback", self.rollback), ("POST", "/models/{name}/verify", self.verify),
            ("PATCH", "/models/{name}/settings", self.settings), ("PUT", "/models/{name}/mode", self.mode),
            ("PUT", "/models/{name}/ladder", self.ladder),
            ("DELETE", "/models/{name}/capture", self.clear_capture), ("POST", "/freeze", self.freeze), ("POST", "/unfreeze", self.unfreeze),
            ("GET", "/jobs", self.jobs), ("GET", "/jobs/{identity}", self.job), ("DELETE", "/jobs/{identity}", self.cancel),
            ("GET", "/timeline", self.timeline),
        ):  # fmt: skip
            router.add_api_route(path, handler, methods=[method], response_model=None)
        return router

    async def status(self, request: Request) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, self._see.status())

    async def models(self, request: Request) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, {"models": self._see.models()})

    async def model(self, request: Request, name: str) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, self._see.model(name))

    async def versions(self, request: Request, name: str) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, {"model": name, "versions": await self._see.versions(name)})

    async def explain(self, request: Request, name: str) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, await self._see.explain(name))

    async def curves(self, request: Request, name: str, version: str) -> Response:
        self._guard.may_read(request)
        return Response(await self._see.curves(name, version), media_type="image/svg+xml")

    async def upload(self, request: Request) -> Response:
        return answer(await self._uploads.upload(request, self._guard.may_change(request)), 201)

    async def remove_model(self, request: Request, name: str) -> Response:
        return answer(await self._do.remove_model(name, self._guard.may_change(request)))

    async def remove_version(self, request: Request, name: str, version: str) -> Response:
        return answer(await self._do.remove_version(name, version, self._guard.may_change(request)))

    async def load_version(self, request: Request, name: str, version: str) -> Response:
        return answer(await self._do.load_version(name, version, self._guard.may_change(request)))

    async def optimize(self, request: Request, name: str, body: Annotated[OptimizeBody | None, Body()] = None) -> Response:
        actor = self._guard.may_change(request)
        asked = body or OptimizeBody.model_validate({})
        if asked.recipe is not None and asked.alternatives is not None:
            raise InvalidRequest("give either `recipe` (steps in order) or `try` (alternatives, each a list of steps), not both")
        tries = [asked.recipe] if asked.recipe is not None else asked.alternatives
        if tries is not None and not all(tries):
            raise InvalidRequest("a recipe needs at least one step; leave `recipe` and `try` out for the planner's choice")
        return answer(await self._do.optimize(name, tries, asked.reason, asked.promote, asked.target, actor), 202)

    async def promote(self, request: Request, name: str, body: PromoteBody) -> Response:
        return answer(await self._do.promote(name, body.version, body.reason, body.force, self._guard.may_change(request)))

    async def rollback(self, request: Request, name: str, body: Annotated[ReasonBody | None, Body()] = None) -> Response:
        actor = self._guard.may_change(request)
        return answer(await self._do.rollback(name, body.reason if body else "asked for", actor))

    async def verify(self, request: Request, name: str, body: Annotated[ReasonBody | None, Body()] = None) -> Response:
        actor = self._guard.may_change(request)
        asked = body or ReasonBody.model_validate({})
        return answer(await self._do.verify(name, asked.version, asked.reason, actor), 202)

    async def settings(self, request: Request, name: str, body: SettingsBody) -> Response:
        actor = self._guard.may_change(request)
        changes = {key: value for key, value in body.model_dump(exclude={"reason"}).items() if value is not None}
        if not changes:
            raise InvalidRequest(
                "no setting was given; name one of batch_limit, instances, queue_limit, intra_op_threads, spin_duration_us, lone_threads"
            )
        return answer(await self._do.settings(name, changes, body.reason, actor))

    async def mode(self, request: Request, name: str, body: ModeBody) -> Response:
        return answer(await self._do.set_mode(name, body.mode, self._guard.may_change(request)))

    async def ladder(self, request: Request, name: str, body: LadderBody) -> Response:
        return answer(await self._do.set_ladder(name, body.rungs, self._guard.may_change(request)))

    async def clear_capture(self, request: Request, name: str) -> Response:
        return answer(await self._do.clear_capture(name, self._guard.may_change(request)))

    async def freeze(self, request: Request) -> Response:
        return answer(await self._do.freeze(True, self._guard.may_change(request)))

    async def unfreeze(self, request: Request) -> Response:
        return answer(await self._do.freeze(False, self._guard.may_change(request)))

    async def jobs(self, request: Request, model: str = "", open: bool = False) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, {"jobs": self._see.jobs(model, open)})

    async def job(self, request: Request, identity: str) -> Response:
        role = self._guard.may_read(request)
        return self._show(role, self._see.job(identity))

    async def cancel(self, request: Request, identity: str) -> Response:
        return answer(await self._do.cancel(identity, self._guard.may_change(request)), 202)

    async def timeline(
        self, request: Request, model: str = "", after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        follow: bool = False,
    ) -> Response:  # fmt: skip
        """The newest `limit` events, oldest first; with `after` those that follow it; with `follow` server-sent events until you leave, those first."""
        role = self._guard.may_read(request)
        if (seen := request.headers.get("last-event-id", "")).isdecimal() and len(seen) < 19:  # a browser takes a broken stream up again
            after = max(after, int(seen))
        if not follow:
            events = await self._see.timeline(model, after, limit, newest_first=not after)
            return self._show(role, {"events": events if after else events[::-1]})
        events_to_come = self._follow(model, after, limit, role)
        return StreamingResponse(events_to_come, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _follow(self, model: str, after: int, limit: int, role: Role) -> AsyncIterator[bytes]:
        looked_at: int | None = after
        newest = not after  # nobody said from where on: the newest `limit` come first, not the journal from its beginning
        while looked_at is not None:
            try:
                events = await self._see.timeline(model, after, limit if newest else FOLLOWED_AT_ONCE, newest_first=newest)
            except StoreUnavailable:
                yield b": the journal is away\n\n"
                await asyncio.sleep(AWAY_S)
                looked_at = await self._see.news(looked_at, 0.0)
                continue
            events, newest = events[::-1] if newest else events, False
            for event in events:
                after = event["seq"]
                data = orjson.dumps(event)
                yield b"id: %d\ndata: %s\n\n" % (after, self._without_paths(data) if role is Role.VIEWER else data)
            if len(events) < FOLLOWED_AT_ONCE:
                yield b": alive\n\n"
                looked_at = await self._see.news(max(looked_at, after), 10.0)
