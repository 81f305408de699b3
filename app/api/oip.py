"""The Open Inference Protocol's endpoints beside infer: health, metadata, configuration, statistics, repository. Translate and call."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import errors
from app.api import extensions
from app.api.auth import Guard
from app.api.bodies import parts_of
from app.api.exchange import Door
from app.serving.service import InferenceService
from app.telemetry.metrics import Metrics

MODEL: Final = "/v2/models/{model}"
VERSIONED: Final = "/v2/models/{model}/versions/{version}"
MAX_SMALL_BODY: Final = 1 << 20


class RepositoryDoor(Protocol):
    """What load and unload need of the server; answers when the thing is done (clients take any status but 200 as an error)."""

    async def load(self, model: str, files: Mapping[str, bytes], actor: str) -> None: ...

    async def unload(self, model: str, actor: str) -> None: ...


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def small_json(request: Request, limit: int = MAX_SMALL_BODY) -> dict[str, Any]:
    """The body of a quiet endpoint as an object; empty means {}. Raises InvalidRequest or PayloadTooLarge."""
    body = bytearray()
    async for chunk in parts_of(request):
        body += chunk
        if len(body) > limit:
            raise errors.PayloadTooLarge(f"the body passes {limit} bytes, which is the most this call takes")
    if not body:
        return {}
    return _object_of(bytes(body)) if len(body) <= MAX_SMALL_BODY else await asyncio.to_thread(_object_of, bytes(body))


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.InvalidRequest(f"the body is not JSON: {error}; it may be left out") from None
    if not isinstance(document, dict):
        raise errors.InvalidRequest(f"the body is a JSON {type(document).__name__}; it must be an object, or left out")
    return document


def _says_nothing(config: object) -> bool:
    """Clients that send files have to send a configuration with them; an empty one asks for nothing."""
    try:
        return isinstance(config, str) and orjson.loads(config) == {}
    except orjson.JSONDecodeError:
        return False


class Protocol2:
    """All handlers of /v2 but infer."""

    def __init__(
        self, service: InferenceService, metrics: Metrics, repository: RepositoryDoor, guard: Guard, ready: Callable[[], tuple[bool, str]],
        statistics: str, allow_files: bool, max_body_bytes: int,
    ) -> None:  # fmt: skip
        self._service, self._metrics, self._repository, self._guard = service, metrics, repository, guard
        self._ready, self._statistics, self._allow_files = ready, statistics, allow_files
        self._load_bytes = max(max_body_bytes, MAX_SMALL_BODY) if allow_files else MAX_SMALL_BODY

    def routes(self, infer: Door) -> list[Route]:
        """The inference side; infer first, since routes are tried in order."""
        both = [
            ("", self.model_metadata),
            ("/ready", self.model_ready),
            ("/config", self.model_config),
            ("/stats", self.model_statistics),
        ]
        return [
            Route(f"{MODEL}/infer", infer, methods=["POST"]),
            Route(f"{VERSIONED}/infer", infer, methods=["POST"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route("/v2", self.server_metadata, methods=["GET"]),
            Route("/v2/models/stats", self.model_statistics, methods=["GET"]),
            *(Route(prefix + path, handler, methods=["GET"]) for prefix in (MODEL, VERSIONED) for path, handler in both),
            Route("/v2/repository/index", self.index, methods=["POST"]),
        ]

    def repository_routes(self) -> list[Route]:
        """The part that changes state: admin."""
        return [
            Route("/v2/repository/models/{model}/load", self.load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", self.unload, methods=["POST"]),
        ]

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        ready, why = self._ready()
        return json_response({"ready": ready, "live": True, **({"reason": why} if why else {})}, 200 if ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        return json_response(extensions.server_metadata())

    async def model_metadata(self, request: Request) -> Response:
        slot = self._service.slot(request.path_params["model"])
        return json_response(extensions.model_metadata(slot, slot.lease(request.path_params.get("version"))))

    async def model_config(self, request: Request) -> Response:
        slot = self._service.slot(request.path_params["model"])
        return json_response(extensions.model_config(slot, slot.lease(request.path_params.get("version"))))

    async def model_ready(self, request: Request) -> Response:
        name, version = request.path_params["model"], request.path_params.get("version")
        slot = self._service.slot(name)
        try:
            loaded = slot.lease(version)
            ready, why = loaded.engine.alive, "" if loaded.engine.alive else "its runner is being restarted"
        except errors.NotReady as error:
            ready, why = False, str(error)
        return json_response({"name": name, "ready": ready, **({"error": why} if why else {})}, 200 if ready else 503)

    async def model_statistics(self, request: Request) -> Response:
        if self._statistics == "off":
            raise errors.NotFound("statistics are switched off here (HONE_METRICS=off)")
        if self._statistics == "admin":
            self._guard.may_read(request)
        name, version = request.path_params.get("model"), request.path_params.get("version")
        if name is not None:
            slot = self._service.slot(name)
            if version is not None and version not in slot.known:
                raise errors.NotFound(f"model {name!r} has no version {version!r}; it has {', '.join(slot.known) or 'none'}")
        self._metrics.begin(self._service.loaded_keys())
        rows = [row for row in list(self._metrics.rows.values()) if name in (None, row.model) and version in (None, row.version)]
        return json_response(extensions.statistics(rows, self._metrics.gauges["hone_model_memory_bytes"]))

    async def index(self, request: Request) -> Response:
        document = await small_json(request)
        ready = document.get("ready", False)
        if not isinstance(ready, bool):
            raise errors.InvalidRequest(f"ready is {ready!r}; it must be true or false")
        return json_response(extensions.index(list(self._service.slots.values()), ready))

    async def load(self, request: Request) -> Response:
        actor = self._guard.may_change(request)
        parameters = (await small_json(request, self._load_bytes)).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise errors.InvalidRequest("parameters must be an object of names and values")
        if parameters.get("config") and not _says_nothing(parameters["config"]):
            raise errors.Unsupported("the load parameter `config` is not taken; what a model needs to be told stands in its model.yaml")
        files = await asyncio.to_thread(self._files, parameters) if parameters else {}
        await self._repository.load(request.path_params["model"], files, actor)
        return json_response({})

    async def unload(self, request: Request) -> Response:
        actor = self._guard.may_change(request)
        await small_json(request)
        await self._repository.unload(request.path_params["model"], actor)
        return json_response({})

    def _files(self, parameters: dict[str, Any]) -> dict[str, bytes]:
        given = {key[len("file:") :]: value for key, value in parameters.items() if key.startswith("file:")}
        if given and not self._allow_files:
            raise errors.NotAllowed(
                "files in load parameters are off here; upload with POST /admin/models, or set HONE_ALLOW_FILE_PARAMETERS=true"
            )
        try:
            return {name: base64.b64decode(value, validate=True) for name, value in given.items()}
        except (binascii.Error, TypeError, ValueError):
            raise errors.InvalidRequest(f"file parameters must be base64 text: {', '.join(sorted(given))}") from None
