"""What every inference door does around a call: request id, headers of the answer, the one Observation, disconnects. Raw ASGI, no framework.

It knows the HTTP side of one exchange, and nothing of the protocol inside the body.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from time import perf_counter
from typing import Any, Final, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from app import errors
from app.api.errors import failure_inside, headers_of, lacks_descriptors, status_of
from app.api.wire.reply import Reply
from app.domain import InferenceResult, Observation

log = logging.getLogger("hone.http")
_PREFIX: Final = os.urandom(6).hex()
_numbers: Final = count(1)
MAX_ID: Final = 128
_CHAIN: Final = 32
"""Causes of an error that are looked at."""
JOINED_BYTES: Final = 64 << 10
"""Bodies up to here are sent as one part: a copy costs less than another write."""


def header_map(scope: Scope) -> dict[bytes, bytes]:
    """Headers by lower-case name; of a repeated one the last."""
    return dict(scope["headers"])


def request_id(headers: dict[bytes, bytes]) -> str:
    """The caller's X-Request-Id where it is printable and not too long, else a new one."""
    given = headers.get(b"x-request-id")
    if given and len(given) <= MAX_ID and given.isascii() and given.decode().isprintable():
        return given.decode()
    return f"{_PREFIX}-{next(_numbers):x}"


class Exchange:
    """One request to a model, from its first byte to its answer."""

    __slots__ = (
        "_receive",
        "_send",
        "_show",
        "answering",
        "decoded",
        "headers",
        "id",
        "model",
        "poisoned",
        "result",
        "rows",
        "scope",
        "started",
        "version",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, show_internals: bool) -> None:
        self.started = perf_counter()
        self.decoded = 0.0
        self.answering = False
        self.scope, self._receive, self._send, self._show = scope, receive, send, show_internals
        self.headers = header_map(scope)
        self.id = request_id(self.headers)
        parameters = scope["path_params"]
        self.model: str = parameters["model"]
        self.version: str | None = parameters.get("version")
        self.result: InferenceResult | None = None
        self.poisoned = False
        """Its inputs hold NaN or infinity. Looked at only where the answer does."""
        self.rows = 1

    @property
    def receive(self) -> Receive:
        return self._receive

    @property
    def caller(self) -> str:
        """Whom to count this request for: the client's address."""
        client = self.scope.get("client")
        return client[0] if client else ""

    async def answer(self, reply: Reply) -> Observation:
        """Send a good answer; the Observation ends where the answer is encoded, not where a slow client has read it."""
        result = self.result
        assert result is not None
        self.answering = True
        now = perf_counter()
        total = now - self.started
        decode = self.decoded - self.started if self.decoded else 0.0
        encode = max(0.0, total - decode - result.queue_s - result.compute_s)
        head = reply.headers
        head.append((b"x-request-id", self.id.encode()))
        if self._show:
            timing = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f, batch;desc=%d" % (
                decode * 1e3, result.queue_s * 1e3, result.compute_s * 1e3, encode * 1e3, result.batch_rows,
            )  # fmt: skip
            head.append((b"server-timing", timing))
            head.append((b"hone-version", result.version.encode()))
            head.append((b"hone-generation", b"%d" % result.generation))
        seen = Observation(
            self.model, result.version, 200, total, decode, result.queue_s, result.compute_s, encode,
            result.batch_rows, self.rows, result.cpu_s, result.wait_s,
        )  # fmt: skip
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        parts = reply.parts if reply.size > JOINED_BYTES else [b"".join(reply.parts)]
        last = len(parts) - 1
        for at, part in enumerate(parts):
            await self._send({"type": "http.response.body", "body": part, "more_body": at < last})
        return seen

    async def refuse(self, error: errors.HoneError, model: str, version: str) -> Observation:
        """Answer with an error; a caller that left gets none, but is counted (499)."""
        status = status_of(error)
        if not isinstance(error, errors.Cancelled):
            body = orjson.dumps({"error": str(error)})
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"x-request-id", self.id.encode())]
            head += [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
            await self._send({"type": "http.response.start", "status": status, "headers": head})
            await self._send({"type": "http.response.body", "body": body})
        total = perf_counter() - self.started
        limited = isinstance(error, errors.CallerLimited)
        return Observation(model, version, status, total, 0.0, 0.0, 0.0, 0.0, 0, self.rows, 0.0, 0.0, limited)


async def until_done_or_gone(exchange: Exchange, work: Coroutine[Any, Any, Any]) -> Any:
    """Await `work` in this task; when the client's connection is lost meanwhile, drop it and raise Cancelled.

    The protocol class calls `on_lost` (app.api.http_protocol); no second task waits per request.
    """
    connection = exchange.scope.get("hone.connection")
    if connection is None:
        return await work
    task = asyncio.current_task(connection.loop)  # without the loop it asks the kernel for its process first
    assert task is not None
    connection.on_lost = task.cancel
    try:
        if connection.lost:
            work.close()
            raise errors.Cancelled("the client left before its request could be queued")
        return await work
    except asyncio.CancelledError:
        if not connection.lost:
            raise
        task.uncancel()
        raise errors.Cancelled("the client left before its answer was ready") from None
    finally:
        connection.on_lost = None


def let_go_of_frames(error: BaseException) -> None:
    """An error holds the frames that it came through, and they hold bodies and the future that holds the error: a circle that only a rare
    collection would open, so that a few dozen refused bodies were gigabytes (and CPython crashes over a memoryview in use in a circle)."""
    chain: BaseException | None = error
    for _ in range(_CHAIN):  # a chain may be a circle itself
        if chain is None:
            return
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__


class Sink(Protocol):
    """Who is told how each exchange ended (app.serving.service)."""

    def observe(self, observation: Observation) -> None: ...
    def refused(self, observation: Observation, error: errors.HoneError) -> None: ...
    def saw_non_finite(self, model: str, version: str, asked_with: bool) -> None: ...
    def label(self, model: str, version: str | None, error: errors.HoneError | None = None) -> tuple[str, str]: ...


class Door:
    """A raw ASGI endpoint around `handler`: whatever happens, one answer and one Observation."""

    def __init__(self, handler: Callable[[Exchange], Awaitable[Reply]], sink: Sink, show_internals: bool) -> None:
        self._handler, self._sink, self._show = handler, sink, show_internals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._show)
        sink = self._sink
        try:
            reply = await self._handler(exchange)
            if reply.non_finite:
                sink.saw_non_finite(exchange.model, exchange.result.version if exchange.result else "", exchange.poisoned)
            seen = await exchange.answer(reply)
        except errors.HoneError as error:
            let_go_of_frames(error)
            seen = await exchange.refuse(error, *sink.label(exchange.model, exchange.version, error))
            sink.refused(seen, error)
        except asyncio.CancelledError:  # the server ends, and its grace time is over
            if exchange.answering:
                raise
            ending = errors.NotReady("the server is shutting down and waited for this request as long as it may; send it again")
            seen = await exchange.refuse(ending, *sink.label(exchange.model, exchange.version))
        except Exception as error:
            failure = failure_inside(error, f"internal error; the server's log tells more under request {exchange.id}")
            log.error(
                "request %s to %s failed inside the server: %s", exchange.id, exchange.model, error, exc_info=not lacks_descriptors(error)
            )
            let_go_of_frames(error)
            seen = await exchange.refuse(failure, *sink.label(exchange.model, exchange.version))
        sink.observe(seen)
