"""The one place where the service's errors get an HTTP status. Every error body is {"error": text} as application/json."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import orjson
from starlette.responses import Response

from app import errors
from app.api.wire.tensors import show

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


def lacks_descriptors(error: Exception) -> bool:
    """No fault inside: connections may take all descriptors that a process may have."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def failure_inside(error: Exception, told: str) -> errors.HoneError:
    """What a caller hears of an error that is none of ours: `told`, or what to do where only descriptors are short."""
    if lacks_descriptors(error):
        return errors.NotReady("the server has no file descriptor left (ulimit -n); keep fewer connections open, or try again in a moment")
    return errors.HoneError(told)


def response_of(error: errors.HoneError) -> Response:
    return error_response(status_of(error), str(error), headers_of(error))


def problem_text(problem: Mapping[str, Any], keys: Sequence[str] = ()) -> str:
    """What pydantic found wrong with a body, in one sentence: the place, its value, the rule. `keys`: what the body may hold."""
    if problem.get("type") == "json_invalid":
        why = problem.get("ctx", {}).get("error", "it cannot be read")
        at = f" at character {problem['loc'][-1]}" if problem.get("loc") else ""
        return f"the body is not JSON: {why}{at}; it must be an object"
    place = ".".join(str(part) for part in problem.get("loc", ()) if part not in ("body", "query", "path"))
    kind, rule = str(problem.get("type")), str(problem.get("msg", "is wrong"))
    if kind == "missing":
        return f"{place or 'the body'} is missing; /docs shows what this takes"
    if kind == "extra_forbidden":
        near = get_close_matches(place, keys, 1)
        known = f"; did you mean {near[0]!r}? Known are {', '.join(keys)}" if near else f"; known are {', '.join(keys)}" if keys else ""
        return f"{place} is nothing that this takes{known}; /docs shows more"
    if not place:
        return f"the body is {show(problem.get('input'))}; it must be a JSON object, as /docs shows"
    return f"{place} is {show(problem.get('input'))}; {rule.replace('Input should', 'it should', 1)}"
