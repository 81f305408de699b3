"""How an answer leaves: head and first body part in one write, as ASGI asks ("must not start sending until a body event"); uvicorn makes two.

On small answers each write costs more than making the answer. It knows no routes and no app.
"""

from __future__ import annotations

from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

JOINED_BYTES: Final = 64 << 10
"""A first part up to here is copied behind its head; a larger one is cheaper to write by itself."""


class OneWriteCycle(RequestResponseCycle):
    """Answers that name their length go out as one write; others (chunked, HEAD, without a body) as uvicorn does it."""

    _head: bytes = b""

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self._head:
            self._send_first(message)
        elif self.response_started or not self._hold_head(message):
            await super().send(message)

    def _hold_head(self, message: Any) -> bool:
        """Keep the head for the body to come; False where it must be sent in uvicorn's way."""
        if message["type"] != "http.response.start" or self.scope["method"] == "HEAD":
            return False
        lines = [STATUS_LINE[message["status"]]]
        length = -1
        headers = [*self.default_headers, *message.get("headers", ())]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                length = int(value)
            elif name not in _USUAL and (name in _UVICORNS or name != name.lower()):
                return False
        if length < 0:
            return False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(headers) + 2 + (not self.keep_alive) or head.count(b"\r") != head.count(b"\n"):
            raise RuntimeError("a header of this answer holds a line break")
        self.response_started = True
        self.waiting_for_100_continue = False
        self.chunked_encoding = False
        self.expected_content_length = length
        self._head = head
        return True

    def _send_first(self, message: Any) -> None:
        if message["type"] != "http.response.body":
            raise RuntimeError(f"a body follows an answer's start, not {message['type']!r}")
        head, self._head = self._head, b""
        body = message.get("body", b"")
        self.expected_content_length -= len(body)
        if self.expected_content_length < 0:
            raise RuntimeError("the answer's body is longer than its content-length")
        if len(body) <= JOINED_BYTES:
            self.transport.write(b"".join((head, body)))
        else:
            self.transport.write(head)
            self.transport.write(body)
        if not message.get("more_body", False):
            self._complete()

    def _complete(self) -> None:
        if self.expected_content_length:
            raise RuntimeError("the answer's body is shorter than its content-length")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive and not self.more_body:
            self.transport.close()
        self.on_response()


_USUAL: Final = frozenset(
    {
        b"date",
        b"server",
        b"content-type",
        b"inference-header-content-length",
        b"x-request-id",
        b"server-timing",
        b"hone-version",
        b"hone-generation",
    }
)
"""Of nearly every answer: nothing to look after."""
_UVICORNS: Final = frozenset({b"transfer-encoding", b"connection"})
"""Headers whose meaning uvicorn looks after."""
