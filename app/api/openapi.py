"""The OpenAPI 3.1 document of everything that Hone answers, hand-parsed bodies too.

Built from a table, not from routes, since most routes read raw bodies; a test holds table and routes together. Knows no server state.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from app import __version__
from app.api.openapi_operations import JSON_TYPE, Example, Operation, operations
from app.api.openapi_schemas import Schema, all_schemas, ref

__all__ = ["Example", "build_openapi"]

EITHER: Final = "/versions/{version}"
TAGS: Final = {
    "inference": "The Open Inference Protocol v2 over REST, with its binary tensor extension, for programs.",
    "predict": "The friendly door: an image, a text or plain JSON in, labels with probabilities out.",
    "models": "What models take and give, how they are configured and how they do.",
    "repository": "The protocol's repository extension; load and unload change state and need the admin token.",
    "admin": "Deploy, optimize, prove, promote and roll back. Reading needs a token, changing the admin token.",
    "operation": "Health and metrics.",
}
ERRORS: Final = {
    400: "The request itself is wrong; the text names the value, the rule and the remedy.",
    401: "No token, or a wrong one.",
    403: "Not with this token, or refused by policy: switched off, frozen, or the golden version.",
    404: "No such model, version, job or page.",
    409: "The state does not allow it: already so, superseded, or not proven on this class of host.",
    411: "The upload needs its Content-Length.",
    413: "The body, unpacked body or image passes a limit.",
    415: "The content type is none that this takes.",
    422: "This very input killed a runner before and is not tried again.",
    429: "The model's queue is full; see Retry-After.",
    501: "Well formed, but this server cannot do it: an extension or an extra is missing.",
    503: "Not ready: starting, loading, unloaded, or its runner was lost; see Retry-After.",
    504: "The deadline passed, or cannot be met by the measured rate and the queue.",
    507: "Not enough room on disk or in memory for it.",
}
RETRY: Final = {429, 503}


def build_openapi(example: Example | None = None, serves: Callable[[str], bool] = lambda path: True) -> dict[str, Any]:
    """The document of those paths that `serves` says are there: a server may have two ports, each with one side."""
    example = example or Example()
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations(example):
        for path in [operation.path.replace("{either}", part) for part in (("", EITHER) if operation.either else ("",))]:
            if serves(path):
                paths.setdefault(path, {})[operation.method.lower()] = _describe(operation, path, example)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hone",
            "version": __version__,
            "summary": "A model server that keeps its models sharp.",
            "description": "Errors are always `{\"error\": text}`; any request may be refused for its HTTP alone (400, 408, 414, 431). Every answer has an `X-Request-Id`; an answer of a model says which version "
            "and generation gave it, and where the time went (`Server-Timing`), unless HONE_SHOW_INTERNALS is off.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": all_schemas(),
            "responses": {f"Error{status}": _error(status, description) for status, description in ERRORS.items()},
            "parameters": _HEADERS,
            "headers": _ANSWER_HEADERS,
            "securitySchemes": {
                "admin": {"type": "http", "scheme": "bearer", "description": "HONE_ADMIN_TOKEN, or STATE/admin-token: reads and changes."},
                "viewer": {"type": "http", "scheme": "bearer", "description": "HONE_VIEWER_TOKEN: only reads."},
                "feedback": {"type": "http", "scheme": "bearer", "description": "HONE_FEEDBACK_TOKEN: sends true labels, and no more."},
            },
        },
    }  # fmt: skip


def _describe(operation: Operation, path: str, example: Example) -> dict[str, Any]:
    served = {"Hone-Version", "Hone-Generation", "Server-Timing"} if operation.tag in ("inference", "predict") else set()
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in sorted({"X-Request-Id", *served})}
    answers: dict[str, Any] = {}
    for status, description, schema in operation.answers:
        content: Schema = {operation.answer_type: {"schema": ref(schema) if schema else {"type": "string"}}}
        if operation.sample is not None:
            content[operation.answer_type]["example"] = operation.sample
        if operation.also:
            content[operation.also] = {}
        answers[str(status)] = {"description": description, "headers": headers, "content": content}
    for failure in operation.errors.split():
        answers.setdefault(failure, {"$ref": f"#/components/responses/Error{failure}"})
    described: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{path}").strip("_"),
        "responses": dict(sorted(answers.items())),
    }
    if operation.details:
        described["description"] = operation.details
    parameters = [_path_parameter(name, example) for name in re.findall(r"{(\w+)}", path)]
    parameters += [{"name": name, "in": "query", "schema": schema, "description": text} for name, schema, text in operation.query]
    parameters += [{"$ref": f"#/components/parameters/{name}"} for name in operation.headers]
    if parameters:
        described["parameters"] = parameters
    if operation.body:
        content = {kind: {"schema": schema} | ({} if sample is None else {"example": sample}) for kind, schema, sample in operation.body}
        described["requestBody"] = {"required": operation.body_needed, "content": content}
    if operation.who:
        described["security"] = [{role: []} if role else {} for role in operation.who]
    return described


def _path_parameter(name: str, example: Example) -> Schema:
    sample = {"model": example.model, "version": example.version}.get(name)
    parameter: Schema = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return parameter if sample is None else parameter | {"example": sample}


def _error(status: int, description: str) -> Schema:
    headers = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    if status in RETRY:
        headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
    return {"description": description, "headers": headers, "content": {JSON_TYPE: {"schema": ref("Error")}}}


def _header(name: str, description: str, **schema: Any) -> Schema:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}


_HEADERS: Final = {
    "Inference-Header-Content-Length": _header(
        "Inference-Header-Content-Length", "Bytes of the JSON part, unpacked; 0: the body is one raw tensor.", type="integer", minimum=0
    ),
    "Content-Encoding": _header("Content-Encoding", "How the body is packed.", enum=["identity", "gzip", "deflate"]),
    "Accept-Encoding": _header("Accept-Encoding", "How the answer may be packed: gzip or deflate; it says so in Content-Encoding."),
    "X-Request-Id": _header("X-Request-Id", "Kept for the answer and the log; assigned where none came.", maxLength=128),
}
_ANSWER_HEADERS: Final = {
    "X-Request-Id": {"description": "The request's, or one that was assigned.", "schema": {"type": "string"}},
    "Hone-Version": {"description": "The version that answered.", "schema": {"type": "string"}},
    "Hone-Generation": {"description": "The model's generation that answered.", "schema": {"type": "string"}},
    "Server-Timing": {"description": "decode, queue, compute, encode in milliseconds, and the batch.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
}
