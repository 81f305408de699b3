"""The HTTP/1.1 side of a connection: uvicorn's httptools protocol with bounds, timeouts, JSON errors and word of lost clients.

httptools keeps a header of any size before it tells anyone; so bytes are counted here, before they are parsed. It knows no routes and no app.
What is refused is answered and then read for a moment (lingering), for a close over unread bytes would reset the answer away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.http_sweeper import Sweeper
from app.api.http_upgrade import framing, parser_within_body

LINGER_BYTES: Final = 64 << 20
LINGER_S: Final = 5.0
_READ_BYTES: Final = 256 << 10
_CHUNK_OVERHEAD: Final = 8
"""Bytes of framing per byte of body that a chunked body may have: one-byte chunks have five."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one request as HTTP. `body_timeout_s` bounds the whole upload, and a reply that the client does not read."""

    header_bytes: int = 32 << 10
    url_bytes: int = 8 << 10
    header_timeout_s: float = 30.0
    body_timeout_s: float = 300.0


@dataclass(slots=True)
class LameDuck:
    """Once `closing` is set, every reply carries Connection: close."""

    closing: bool = False


class Stage(IntEnum):
    """What the connection's next bytes belong to. AWAITED: to a request that ought to come soon (a new connection, blank lines)."""

    IDLE = 0
    AWAITED = 1
    HEAD = 2
    BODY = 3


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
        self._stage = Stage.AWAITED
        self._since = self.loop.time()
        self._head_bytes = 0
        self._begun = 0
        self._inexact = False
        self._chunked = False
        self._body_bytes = self._wire_bytes = self._gap_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._refused = False
        self._discarded = 0
        self._stuck_since = 0.0

    # ---- bytes in ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        stage, begun, body_bytes = self._stage, self._begun, self._body_bytes
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(*(self._refusal or (400, f"malformed HTTP: {error}")))
            return
        if self._stage is Stage.IDLE and (self._begun != begun or stage >= Stage.HEAD):
            return
        self._count(len(data), stage, self._begun - begun, body_bytes)

    def _feed(self, data: bytes | memoryview) -> None:
        while data:
            room = self.limits.header_bytes - self._head_bytes
            try:
                if self._stage is Stage.BODY:
                    self._inexact = True
                elif len(data) > room:
                    data = self._feed_head(memoryview(data), room)
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                lines = framing(self.headers) if self._stage is Stage.BODY else b""
                self.parser = parser_within_body(self, lines) if lines else httptools.HttpRequestParser(self)
                data = memoryview(data)[offer.args[0] :]

    def _feed_head(self, data: memoryview, room: int) -> memoryview:
        """Feed as much of `data` as a header block may have; the rest, if that was no more than one, comes back."""
        fresh, begun = self._stage is not Stage.HEAD, self._begun
        self.parser.feed_data(data[:room])
        if self._stage in (Stage.AWAITED, Stage.HEAD) and self._begun - begun <= fresh:
            self._head_too_large()
            raise httptools.HttpParserError
        self._inexact = True
        return data[room:]

    def _count(self, size: int, stage: Stage, begun: int, body_bytes: int) -> None:
        """After data that did not end with a request's end: bound what is still open, and note since when it is."""
        if self._stage is Stage.BODY:
            if stage is not Stage.BODY:
                self._since = self.loop.time()
            if self.cycle.response_complete:
                self._discard(size)
            elif self._chunked:
                self._count_chunks(size, body_bytes)
            return
        if stage is Stage.IDLE or stage is Stage.BODY or begun > 1:
            self._since = self.loop.time()
        if self._stage is Stage.IDLE:
            self._stage = Stage.AWAITED  # blank lines before a request count as its head
        if begun > (stage < Stage.HEAD):  # where in the data it began is not known; on_headers_complete measures it
            self._head_bytes, self._inexact = 0, True
        else:
            self._head_bytes += size

    def _count_chunks(self, size: int, body_bytes: int) -> None:
        """Chunk extensions and trailers are bounded like headers."""
        self._wire_bytes += size
        self._gap_bytes = self._gap_bytes + size if body_bytes == self._body_bytes else 0
        allowed = self.limits.header_bytes
        framing = self._wire_bytes - self._body_bytes
        if self._gap_bytes > allowed or framing > allowed + _READ_BYTES + _CHUNK_OVERHEAD * self._body_bytes:
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
        self._stage = Stage.HEAD
        self._begun += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is Stage.HEAD:  # trailers come this way too, and are dropped
            HttpToolsProtocol.on_header(self, name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) > self.limits.url_bytes or (self._inexact and self._head_size() > self.limits.header_bytes):
            self._head_too_large()
            raise _Refused
        self._stage = Stage.BODY
        self._inexact = self._chunked = False
        self._head_bytes = self._body_bytes = self._wire_bytes = self._gap_bytes = self._discarded = 0
        HttpToolsProtocol.on_headers_complete(self)
        if self.lame_duck.closing:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        self._chunked = True

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and framing(self.headers):
            return  # its body is still to come: see _feed
        self._stage = Stage.IDLE
        HttpToolsProtocol.on_message_complete(self)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # ---- refusing ----------------------------------------------------------------------------------------------------

    def _refuse(self, status: int, text: str) -> None:
        """Answer with a JSON error and close; where an earlier request is still being answered, close after that answer instead."""
        self._refused = True
        self._since = self.loop.time()
        self._unset_keepalive_if_required()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or not cycle.more_body:
                self.pipeline.clear()
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
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        self.transport.write(b"".join([*lines, body]))
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
        if self._stage is Stage.BODY:
            self._since = self.loop.time()  # the rest of an unread body is read away, for a while
        HttpToolsProtocol.on_response_complete(self)

    def check(self, now: float) -> None:
        """End what takes too long. Called by the sweeper, some times a second."""
        open_s = now - self._since
        if self._stuck_since and now - self._stuck_since > self.limits.body_timeout_s:
            self.transport.abort()
        elif self.transport.is_closing():
            self._stuck_since = self._stuck_since or now
        elif self._refused:
            if open_s > LINGER_S and (self.cycle is None or self.cycle.response_complete or self.cycle.disconnected):
                self.transport.close()
        elif self._stage in (Stage.AWAITED, Stage.HEAD) and open_s > self.limits.header_timeout_s:
            if self._head_bytes:
                self._refuse(408, f"the headers took longer than {self.limits.header_timeout_s:g} seconds, the limit")
            else:
                self.transport.close()
        elif self._stage is Stage.BODY and self.cycle.response_complete:
            if open_s > LINGER_S:
                self.transport.close()
        elif self._stage is Stage.BODY and open_s > self.limits.body_timeout_s:
            self._refuse(
                408, f"the body took longer than {self.limits.body_timeout_s:g} seconds, the limit; send it faster, or less at once"
            )

    # ---- losing the client -------------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        HttpToolsProtocol.connection_lost(self, exc)
        self._tell_lost()

    def _tell_lost(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


def protocol_class(limits: HttpLimits, lame_duck: LameDuck) -> type[HoneProtocol]:
    """The class to give to uvicorn.Config(http=…), with `ws="none"`."""
    return type("HoneProtocol", (HoneProtocol,), {"limits": limits, "lame_duck": lame_duck})
