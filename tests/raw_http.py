"""A real uvicorn server with the protocol class, and raw sockets that talk to it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from app.api.http_protocol import HoneProtocol, HttpLimits, LameDuck, protocol_class

LIMITS = HttpLimits(header_bytes=32 << 10, url_bytes=4000, header_timeout_s=1.0, body_timeout_s=2.0)


class App:
    """Answers with what it was sent; `/early` before it has read, `/wait` once told, `/huge` with 100 MB."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.left: list[str] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        path, size, more = scope["path"], 0, scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(path)
                return
            size, more = size + len(message["body"]), message.get("more_body", False)
        self.seen.append((path, size))
        self.headers.append(list(scope["headers"]))
        connection: HoneProtocol = scope["hone.connection"]
        if path == "/wait":
            gone = asyncio.Event()
            connection.on_lost = gone.set
            await gone.wait()
            assert connection.lost
            self.left.append(path)
            return
        body = bytes(100 << 20) if path == "/huge" else json.dumps({"size": size}).encode()
        status = 413 if path == "/early" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


class Warnings(logging.Handler):
    """What the server or its loop complained about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(self.format(record) for record in self.records)


class Running:
    def __init__(self, app: App, port: int, server: uvicorn.Server, lame_duck: LameDuck, log: Warnings) -> None:
        self.app, self.port, self.server, self.lame_duck, self.log = app, port, server, lame_duck, log

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(30)
        return client

    def wait_until(self, met: Any) -> None:
        deadline = time.monotonic() + 20
        while not met():
            assert time.monotonic() < deadline, "did not happen in 20 s"
            time.sleep(0.01)


@contextmanager
def serving(limits: HttpLimits = LIMITS, loop: str = "uvloop") -> Iterator[Running]:
    app, lame_duck, log = App(), LameDuck(), Warnings()
    config = uvicorn.Config(
        app, port=0, loop=loop, http=protocol_class(limits, lame_duck), ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=run_server, args=(server, listener, config))
    thread.start()
    running = Running(app, listener.getsockname()[1], server, lame_duck, log)
    logging.getLogger().addHandler(log)
    try:
        running.wait_until(lambda: server.started)
        yield running
    finally:
        logging.getLogger().removeHandler(log)
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def run_server(server: uvicorn.Server, listener: socket.socket, config: uvicorn.Config) -> None:
    factory = config.get_loop_factory()
    assert factory is not None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(server.serve([listener]))


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def served(request: pytest.FixtureRequest) -> Iterator[Running]:
    with serving(loop=request.param) as running:
        yield running


def answers(client: socket.socket, count: int) -> Iterator[tuple[int, dict[str, str], bytes]]:
    """The next responses; fails where the connection ends before they are whole."""
    data = b""

    def more() -> bytes:
        piece = client.recv(1 << 20)
        assert piece, f"closed after {data[:500]!r}"
        return piece

    for _ in range(count):
        while b"\r\n\r\n" not in data:
            data += more()
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        size = int(headers["content-length"])
        while len(data) < size:
            data += more()
        yield int(lines[0].split()[1]), headers, data[:size]
        data = data[size:]


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    return next(answers(client, 1))


def closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def refusal(client: socket.socket, status: int) -> str:
    got, headers, body = answer(client)
    assert got == status, body
    assert headers["content-type"] == "application/json" and headers["connection"] == "close"
    assert headers["x-request-id"]
    document = json.loads(body)
    assert list(document) == ["error"]
    text: str = document["error"]
    return text


def send_all_you_can(client: socket.socket, data: bytes, times: int = 1) -> None:
    try:
        for _ in range(times):
            client.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def post(path: str, body: bytes, extra: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (path.encode(), len(body), extra, body)
