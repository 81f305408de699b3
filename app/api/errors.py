"""The one place where the service's errors get an HTTP status. Every error body is {"error": text} as application/json."""

from __future__ import annotations

import math
from typing import Final

import orjson
from starlette.responses import Response

from app import errors

_STATUS: Final[tuple[tuple[type[errors.HoneError], int], ...]] = (
    (errors.PayloadTooLarge, 413),
    (errors.Quarantined, 422),
    (errors.ModelFailed, 400),
    (errors.ModelRejected, 400),
    (errors.UnsupportedMediaType, 415),
    (errors.InvalidRequest, 400),
    (errors.Unauthorized, 401),
    (errors.NotAllowed, 403),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.QueueFull, 429),
    (errors.Cancelled, 499),
    (errors.Unsupported, 501),
    (errors.NotReady, 503),
    (errors.RunnerLost, 503),
    (errors.DeadlineExceeded, 504),
    (errors.InsufficientStorage, 507),
)


def status_of(error: errors.HoneError) -> int:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 500


def error_response(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps({"error": text}), status, headers, "application/json")


def headers_of(error: errors.HoneError) -> dict[str, str]:
    """Retry-After or WWW-Authenticate where they belong."""
    headers: dict[str, str] = {}
    if isinstance(error, errors.QueueFull | errors.NotReady | errors.RunnerLost):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="hone"'
    return headers


def response_of(error: errors.HoneError) -> Response:
    return error_response(status_of(error), str(error), headers_of(error))
