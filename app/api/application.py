"""The ASGI application: all doors in one place, errors as JSON for every route, and a gate before the admin side.

It is handed its parts; app.main makes them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import __version__
from app.api.admin import Admin
from app.api.auth import Guard
from app.api.docs import docs_routes
from app.api.errors import error_response, failure_inside, problem_text, response_of
from app.api.exchange import Door, request_id
from app.api.infer import Infer
from app.api.labels import feedback_route
from app.api.offload import Offload
from app.api.oip import MAX_SMALL_BODY, Protocol2
from app.api.openapi import build_openapi
from app.api.predict import PATHS, Predict
from app.errors import HoneError, NotReady
from app.serving.service import InferenceService
from app.store.base import StoreUnavailable
from app.telemetry.prometheus import Exporter

log = logging.getLogger("hone.http")
ADMIN_PREFIX: Final = "/admin"
REPOSITORY_PREFIX: Final = "/v2/repository/models/"
METRICS_PATH: Final = "/metrics"
HEALTH_PREFIX: Final = "/v2/health/"
UPLOAD_PATH: Final = "/admin/models"
_UNPARSED: Final = "There was an error parsing the body"
_MODEL: Final = r"([^/]+)(?:/versions/([^/]+))?"
INFER_PATH: Final = re.compile(rf"/v2/models/{_MODEL}/infer")
PREDICT_PATH: Final = re.compile(rf"/models/{_MODEL}/predict")


@dataclass(frozen=True)
class Surfaces:
    """Which sides one port shows."""

    inference: bool = True
    admin: bool = True

    def serves(self, path: str) -> bool:
        """Whether a documented path is on this port."""
        if path.startswith((ADMIN_PREFIX, REPOSITORY_PREFIX)):
            return self.admin
        return self.inference or path.startswith(HEALTH_PREFIX) or not path.startswith(("/v2", "/models/"))

    def elsewhere(self, path: str) -> str:
        """What to say of a path that the server's other port may have; empty where there is none."""
        if not self.admin and path.startswith((ADMIN_PREFIX, REPOSITORY_PREFIX)):
            return " on this port: the admin side of this server has a port of its own; ask there (`hone` finds it by HONE_ADMIN_PORT, or by --url)"
        if not self.inference and path.startswith(("/v2", "/models/")):
            return " on this port, the admin side's; inference is on the server's other one (HONE_PORT)"
        return ""


def build_app(
    surfaces: Surfaces, service: InferenceService, offload: Offload, protocol: Protocol2, admin: Admin, guard: Guard, exporter: Exporter,
    metrics: str, show_internals: bool, lifespan: Callable[[FastAPI], Any] | None = None,
) -> ASGIApp:  # fmt: skip
    """One port's application. `metrics` is open, admin or off."""
    app = FastAPI(title="Hone", version=__version__, openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    routes: list[BaseRoute] = []
    doors: list[tuple[re.Pattern[str], Door]] = []
    if surfaces.inference:
        infer = Door(Infer(service, offload), service, show_internals)
        predict = Door(
            Predict(service, offload, lambda exchange: offload.read_unpacked(exchange.headers, exchange.receive)), service, show_internals
        )  # fmt: skip
        doors = [(INFER_PATH, infer), (PREDICT_PATH, predict)]
        routes += protocol.routes(infer)
        routes += [Route(path, predict, methods=["POST"]) for path in PATHS]
        routes.append(feedback_route(service, guard))
    else:
        routes += [Route("/v2/health/live", protocol.live), Route("/v2/health/ready", protocol.ready)]
    if surfaces.admin:
        routes += protocol.repository_routes()
    routes += operation_routes(surfaces, guard, exporter, metrics)
    app.router.routes[:0] = routes
    app.router.redirect_slashes = False  # Gate takes a path with a slash at its end for the one without
    if surfaces.admin:
        app.include_router(admin.router())
    _answer_errors_as_json(app, surfaces)
    return Gate(app, guard, surfaces, doors)


def operation_routes(surfaces: Surfaces, guard: Guard, exporter: Exporter, metrics: str) -> Sequence[BaseRoute]:
    """/metrics, and the documentation that works without internet."""

    async def show_metrics(request: Request) -> Response:
        if metrics == "admin":
            guard.may_read(request)
        pieces, content_type = exporter.pieces(request.headers.get("accept", ""))
        parts = []
        for piece in pieces:
            parts.append(piece)
            await asyncio.sleep(0)  # who waits for a model is answered between two pieces
        return Response(b"".join(parts), media_type=None, headers={"Content-Type": content_type})

    shown = [] if metrics == "off" else [Route(METRICS_PATH, show_metrics, methods=["GET"])]
    return [*shown, *docs_routes(build_openapi(serves=lambda path: surfaces.serves(path) and (path != METRICS_PATH or bool(shown))))]


class Gate:
    """Before everything else: who may come to the admin side, and a request id on every answer.

    What is posted to a model goes straight to its door: the framework's middleware and router take as long as all that Hone does with
    a small request, and the door needs neither.
    """

    def __init__(self, app: ASGIApp, guard: Guard, surfaces: Surfaces, doors: Sequence[tuple[re.Pattern[str], ASGIApp]]) -> None:
        self._app, self._guard, self._surfaces, self._doors = app, guard, surfaces, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path[-1:] == "/" and path != "/":  # a redirect would lose the body of a POST, and name a host that the client may not know
            path = path.rstrip("/") or "/"
            scope = {**scope, "path": path}
        if path.endswith(("/infer", "/predict")):
            door = self._door(scope, path)
            if door is not None:
                await door(scope, receive, send)
                return
        identity = request_id(dict(scope["headers"])).encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
            await send(message)

        if path.startswith((ADMIN_PREFIX, REPOSITORY_PREFIX)):
            try:
                self._admit(scope)
            except HoneError as error:
                await response_of(error)(scope, receive, send_with_id)
                return
            if path != UPLOAD_PATH:
                scope = _read_as_json(scope)
                receive = _bounded(receive) if path.startswith(ADMIN_PREFIX) else receive
        await self._app(scope, receive, send_with_id)

    def _door(self, scope: Scope, path: str) -> ASGIApp | None:
        if scope["method"] == "POST":
            for pattern, door in self._doors:
                if found := pattern.fullmatch(path):
                    model, version = found.groups()
                    scope["path_params"] = {"model": model} if version is None else {"model": model, "version": version}
                    return door
        return None

    def _admit(self, scope: Scope) -> None:
        """Checked before a byte of the body is read: without a token 401 and nothing else."""
        if not self._surfaces.admin:
            return
        connection = HTTPConnection(scope)
        if scope["method"] in {"GET", "HEAD"}:
            self._guard.may_read(connection)
        else:
            self._guard.may_change(connection)


def _read_as_json(scope: Scope) -> Scope:
    """Admin bodies are JSON whatever their type says, since curl -d calls everything a form; only an upload is one."""
    others = [header for header in scope["headers"] if header[0] != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _bounded(receive: Receive) -> Receive:
    """The framework reads a body to its end before anybody looks at it: what passes the bound is refused as it comes."""
    taken = 0

    async def receive_bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_SMALL_BODY:
            raise HTTPException(413, f"the body passes {MAX_SMALL_BODY} bytes, which is the most this call takes")
        return message

    return receive_bounded


def _answer_errors_as_json(app: FastAPI, surfaces: Surfaces) -> None:
    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, HoneError)
        return response_of(error)

    async def away(request: Request, error: Exception) -> Response:
        return response_of(NotReady(f"the journal does not answer, so nothing can be changed or looked up there now: {error}"))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = error.detail
        if error.status_code == 400 and text == _UNPARSED:
            text = "the body cannot be read as JSON; send an object that is not nested so deeply"
        if error.status_code == 404 and text == HTTPStatus.NOT_FOUND.phrase:
            text = f"nothing is at {request.url.path[:200]}{surfaces.elsewhere(request.url.path) or '; /docs describes all there is'}"
        if error.status_code == 405:
            text = f"{request.method} is not possible at {request.url.path[:200]}; /docs describes what is"
        return error_response(error.status_code, str(text), dict(error.headers or {}))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        keys = _keys_of(request)
        return error_response(400, "; ".join(problem_text(problem, keys) for problem in error.errors()[:5]))

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed inside the server", request.method, request.url.path, exc_info=error)
        return response_of(failure_inside(error, "internal error; the server's log tells more"))

    app.add_exception_handler(HoneError, known)
    app.add_exception_handler(StoreUnavailable, away)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)


def _keys_of(request: Request) -> Sequence[str]:
    """What the body that this route takes may hold."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return tuple(getattr(field.field_info.annotation, "model_fields", ())) if field is not None else ()
