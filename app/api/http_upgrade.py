"""Requests that offer another protocol (Upgrade: h2c, as Java's HttpClient does with every first request) and are answered as they are.

The parser takes all after such a head for the other protocol, and would lose the body. A second parser is shown the part of the head
that frames the body, and goes on from there.
"""

from __future__ import annotations

from typing import Protocol

import httptools


class ParserCallbacks(Protocol):
    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_chunk_header(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


def framing(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The header lines that say how long the body is; empty where there is none."""
    return b"".join(
        [b"%b: %b\r\n" % header for header in headers if header[0] in (b"content-length", b"transfer-encoding") and header[1] != b"0"]
    )


def parser_within_body(callbacks: ParserCallbacks, lines: bytes) -> httptools.HttpRequestParser:
    """A parser that stands behind a head with these framing lines, of which `callbacks` has heard already."""
    parser = httptools.HttpRequestParser(_AfterHead(callbacks))
    parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % lines)
    return parser


class _AfterHead:
    """Passes on all but the first head."""

    def __init__(self, callbacks: ParserCallbacks) -> None:
        self._callbacks = callbacks
        self._heard = False
        self.on_body = callbacks.on_body
        self.on_chunk_header = callbacks.on_chunk_header
        self.on_message_complete = callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if self._heard:
            self._callbacks.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._heard:
            self._callbacks.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._heard:
            self._callbacks.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._heard:
            self._callbacks.on_headers_complete()
        self._heard = True
