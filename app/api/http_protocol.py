"""The HTTP/1.1 side of a connection: uvicorn's httptools protocol with bounds, timeouts, JSON errors and word of lost clients.

httptools keeps a header of any size before it tells anyone; so bytes are counted here, before they are parsed. It knows no routes and no app.
What is refused is answered and then read for a moment (lingering), for a close over unread bytes would reset the answer away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import httptools
import orjson
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.api.exchange import request_id
from app.api.http_cycle import OneWriteCycle
from app.api.http_sweeper import Sweeper
from app.api.http_upgrade import framing, parser_within_body

LINGER_BYTES: Final = 64 << 20
LINGER_S: Final = 5.0
_READ_BYTES: Final = 256 << 10
_CHUNK_OVERHEAD: Final = 8
"""Bytes of framing per byte of body that a chunked body may have: one-byte chunks have five."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one request as HTTP. `body_timeout_s` bounds the whole upload, and a reply that the client does not read.

    A body of more than `small_bytes` holds memory that others wait for: it comes at `least_bytes` in each `stall_s`, or ends.
    """

    header_bytes: int = 32 << 10
    url_bytes: int = 8 << 10
    header_timeout_s: float = 30.0
    body_timeout_s: float = 300.0
    stall_s: float = 10.0
    least_bytes: int = 16 << 10
    small_bytes: int = 64 << 10


@dataclass(slots=True)
class LameDuck:
    """Once `closing` is set, every reply carries Connection: close."""

    closing: bool = False


# What the connection's next bytes belong to: nothing (or the next request), a request that ought to come soon (a new connection, blank
# lines), a head, a body, or nothing any more. Plain integers, for an enum's members cost a look-up each on every request.
_IDLE: Final = 0
_AWAITED: Final = 1
_HEAD: Final = 2
_BODY: Final = 3
_REFUSED: Final = 4


class _Refused(Exception):
    """Raised through the parser, which then stops; the reason stands in `_refusal`."""


class HoneProtocol(HttpToolsProtocol):
    """One connection. As scope["hone.connection"] it tells a request `lost`, and calls its `on_lost`, once the client is gone."""

    limits = HttpLimits()
    lame_duck = LameDuck()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url = b""
        self.lost = False
        self.on_lost: Callable[[], object] | None = None
        self._running: RequestResponseCycle | None = None
        """Whose answer is being made; `cycle` is the newest, which may wait behind it (pipelining)."""
        self._stage = _AWAITED
        self._since = self.loop.time()
        self._head_bytes = 0
        self._begun = 0
        self._inexact = False
        self._chunked = False
        self._body_bytes = self._wire_bytes = self._gap_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._discarded = 0
        self._stuck_since = 0.0
        self._seen = 0, 0
        self._moved_at = 0.0

    # ---- bytes in ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        stage, begun, body_bytes = self._stage, self._begun, self._body_bytes
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(*(self._refusal or (400, f"malformed HTTP: {self._told(error)}")))
        if self._stage != _IDLE or (self._begun == begun and stage < _HEAD):
            self._count(len(data), stage, self._begun - begun, body_bytes)

    def _told(self, error: Exception) -> str:
        """What the parser says; where one of its callbacks failed, that is about the target, the one thing that they read further."""
        if not isinstance(error, httptools.HttpParserCallbackError):
            return str(error)
        return f"the target {self.url[:80].decode('ascii', 'backslashreplace')!r} is no path such as /v2"

    def _feed(self, data: bytes | memoryview) -> None:
        while data and self._stage != _REFUSED:
            try:
                if self._stage == _BODY:
                    self._inexact = True
                elif len(data) > (room := self.limits.header_bytes - self._head_bytes):
                    data = self._feed_head(memoryview(data), room)
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                lines = framing(self.headers) if self._stage == _BODY else b""
                self.parser = parser_within_body(self, lines) if lines else httptools.HttpRequestParser(self)
                data = memoryview(data)[offer.args[0] :]

    def _feed_head(self, data: memoryview, room: int) -> memoryview:
        """Feed as much of `data` as a header block may have; the rest, if that was no more than one, comes back."""
        fresh, begun = self._stage != _HEAD, self._begun
        self.parser.feed_data(data[:room])
        if self._stage in (_AWAITED, _HEAD) and self._begun - begun <= fresh:
            self._head_too_large()
            raise httptools.HttpParserError
        self._inexact = True
        return data[room:]

    def _count(self, size: int, stage: int, begun: int, body_bytes: int) -> None:
        """After data that did not end with a request's end: bound what is still open, and note since when it is."""
        if self._stage == _REFUSED:
            self._discard(size)
            return
        if self._stage == _BODY:
            if stage != _BODY:
                self._since = self.loop.time()
            if self.cycle.response_complete:
                self._discard(size)
            elif self._chunked:
                self._count_chunks(size, body_bytes)
            return
        if stage in (_IDLE, _BODY) or begun > 1:
            self._since = self.loop.time()
        if self._stage == _IDLE:
            self._stage = _AWAITED  # blank lines before a request count as its head
        if begun > (stage < _HEAD):  # where in the data it began is not known; on_headers_complete measures it
            self._head_bytes, self._inexact = 0, True
        else:
            self._head_bytes += size

    def _count_chunks(self, size: int, body_bytes: int) -> None:
        """Chunk extensions and trailers are bounded like headers."""
        self._wire_bytes += size
        self._gap_bytes = self._gap_bytes + size if body_bytes == self._body_bytes else 0
        allowed = self.limits.header_bytes
        overhead = self._wire_bytes - self._body_bytes
        if self._gap_bytes > allowed or overhead > allowed + _READ_BYTES + _CHUNK_OVERHEAD * self._body_bytes:
            self._refuse(431, f"chunk extensions and trailers have more than {allowed} bytes, the limit of a header block; send fewer")

    def _head_too_large(self) -> None:
        if len(self.url) > self.limits.url_bytes:
            self._refusal = (414, f"the URL has more than {self.limits.url_bytes} bytes, the limit; send what is long in the body")
        else:
            self._refusal = (431, f"the headers have more than {self.limits.header_bytes} bytes, the limit; send fewer or shorter ones")

    # ---- the parser's callbacks --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        HttpToolsProtocol.on_message_begin(self)
        self.scope["hone.connection"] = self  # type: ignore[typeddict-unknown-key]
        self._stage = _HEAD
        self._begun += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage != _HEAD:
            return  # a trailer: what came after the body does not change what came before it
        name = name.lower()
        value = value.rstrip(b" \t")  # RFC 9112, 5: blanks around a value are no part of it; the parser drops those before
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if len(self.url) > self.limits.url_bytes or (self._inexact and self._head_size() > self.limits.header_bytes):
            self._head_too_large()
            raise _Refused
        self._refusal = self._misheaded()
        if self._refusal is not None:
            raise _Refused
        self._stage = _BODY
        self._inexact = self._chunked = False
        self._head_bytes = self._body_bytes = 0
        HttpToolsProtocol.on_headers_complete(self)
        if self.lame_duck.closing:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.__class__ = OneWriteCycle  # uvicorn makes its own; this one only sends otherwise
        self._running = cycle
        HttpToolsProtocol._start_asgi_task(self, cycle, app)

    def on_chunk_header(self) -> None:
        if not self._chunked:
            self._chunked = True
            self._wire_bytes = self._gap_bytes = 0

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        self._body_bytes += len(body)
        if not cycle.response_complete:
            if not cycle.body:
                cycle.body = body  # type: ignore[assignment]  # a body in one piece passes through the cycle uncopied
            else:
                if isinstance(cycle.body, bytes):
                    cycle.body = bytearray(cycle.body)
                cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and framing(self.headers):
            return  # its body is still to come: see _feed
        self._stage = _IDLE
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def _misheaded(self) -> tuple[int, str] | None:
        """What a proxy before us may read otherwise: whose request it is (RFC 9112, 3.2), and where its body ends (6.1)."""
        hosts = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                coding = value[:80].decode("ascii", "backslashreplace")
                return 501, f"Transfer-Encoding {coding!r} is not known here: send chunked; what is compressed is said by Content-Encoding"
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            return 400, f"malformed HTTP: {hosts or 'no'} Host headers; a request of HTTP/1.1 has one"
        return None

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # ---- refusing ----------------------------------------------------------------------------------------------------

    def _refuse(self, status: int, text: str) -> None:
        """Answer with a JSON error and close; where an earlier request is still being answered, close after that answer instead."""
        headers = self.headers if self._stage in (_HEAD, _BODY) else []
        self._stage = _REFUSED
        self._since = self.loop.time()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline and cycle.more_body:  # it was still to come, behind others that are whole
                self.pipeline.popleft()
                self.cycle = cycle = self.pipeline[0][0] if self.pipeline else self._running or cycle
            if self.pipeline or not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
            self._tell_lost()
            if cycle.response_started:
                self.transport.close()
                return
        body = orjson.dumps({"error": text})
        lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in self.server_state.default_headers)]
        identity = request_id(dict(headers)).encode()
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n" % (len(body), identity))
        lines.append(b"connection: close\r\n\r\n")
        self.transport.write(b"".join([*lines, body]))
        self._say_no_more()

    def _say_no_more(self) -> None:
        """End our side and drop what still comes, for a while: a connection closed upon unread data is reset, and the answer lost on its way."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > LINGER_BYTES:
            self.transport.close()

    # ---- time --------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        HttpToolsProtocol.connection_made(self, transport)
        Sweeper.of(self.server_state, self.loop).start()

    def pause_writing(self) -> None:
        self._stuck_since = self.loop.time()
        HttpToolsProtocol.pause_writing(self)

    def resume_writing(self) -> None:
        self._stuck_since = 0.0
        HttpToolsProtocol.resume_writing(self)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._stage == _BODY and not self.cycle.keep_alive:  # answered before its body was read
            self._stage, self._since, self._discarded = _REFUSED, self.loop.time(), 0
            self._say_no_more()
            return
        if self._stage in (_IDLE, _BODY):  # a kept connection, or the rest of an unread body: each for a while
            self._since = self.loop.time()
            self._discarded = 0
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def check(self, now: float) -> None:
        """End what takes too long. Called by the sweeper, some times a second."""
        stage, open_s, limits = self._stage, now - self._since, self.limits
        answered = self.cycle is None or self.cycle.response_complete or self.cycle.disconnected
        if self._stuck_since and now - self._stuck_since > limits.body_timeout_s:
            self.transport.abort()
        elif self.transport.is_closing():
            self._stuck_since = self._stuck_since or now
        elif stage == _IDLE and answered and open_s > self.timeout_keep_alive:
            self.transport.close()
        elif stage in (_AWAITED, _HEAD) and open_s > limits.header_timeout_s:
            if self._head_bytes or not answered:
                self._refuse(408, f"the headers took longer than {limits.header_timeout_s:g} seconds, the limit")
            else:
                self.transport.close()
        elif stage in (_BODY, _REFUSED) and answered and open_s > LINGER_S:
            self.transport.close()
        elif stage == _BODY and self._stalls(now):
            rate = f"{limits.least_bytes} bytes in {limits.stall_s:g} seconds"
            self._refuse(408, f"the body came at less than {rate}, the limit for one over {limits.small_bytes} bytes; send it faster")
        elif stage == _BODY and open_s > limits.body_timeout_s:
            self._refuse(408, f"the body took longer than {limits.body_timeout_s:g} seconds, the limit; send it faster, or less at once")

    def _stalls(self, now: float) -> bool:
        """Whether a body that holds memory hardly comes, though it is read (a client that was told to wait, or is not read, does not stall)."""
        waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
        begun, before = self._seen
        if waits or begun != self._begun or self._body_bytes - before >= self.limits.least_bytes:
            self._seen, self._moved_at = (self._begun, self._body_bytes), now
            return False
        return now - self._moved_at > self.limits.stall_s and max(self._announced(), self._body_bytes) > self.limits.small_bytes

    def _announced(self) -> int:
        length = dict(self.headers).get(b"content-length", b"")
        return int(length) if length.isdigit() else 0

    # ---- losing the client -------------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        HttpToolsProtocol.connection_lost(self, exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells the newest only
            self._running.message_event.set()
        self._tell_lost()

    def _tell_lost(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


def protocol_class(limits: HttpLimits, lame_duck: LameDuck) -> type[HoneProtocol]:
    """The class to give to uvicorn.Config(http=…), with `ws="none"`."""
    return type("HoneProtocol", (HoneProtocol,), {"limits": limits, "lame_duck": lame_duck})
