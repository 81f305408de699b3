"""How answers leave a real server: what is one write arrives as one read, and what an app does wrong closes its connection only."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from app.api.http_cycle import JOINED_BYTES
from app.api.http_protocol import HttpLimits, LameDuck, protocol_class

Headers = list[tuple[bytes, bytes]]


class App:
    """Answers as the test says: headers, then parts with a pause between them."""

    def __init__(self) -> None:
        self.headers: Headers = []
        self.parts: list[bytes] = []
        self.errors: list[BaseException] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            last = len(self.parts) - 1
            for at, part in enumerate(self.parts):
                await send({"type": "http.response.body", "body": part, "more_body": at < last})
        except RuntimeError as error:
            self.errors.append(error)
            raise


@contextmanager
def serving(app: App, duck: LameDuck) -> Iterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=protocol_class(HttpLimits(), duck), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def duck() -> LameDuck:
    return LameDuck()


@pytest.fixture
def address(app: App, duck: LameDuck) -> Iterator[tuple[str, int]]:
    with serving(app, duck) as found:
        yield found


def exchange(address: tuple[str, int], request: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", reads: int = 1) -> bytes:
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(request)
        return b"".join(client.recv(1 << 20) for _ in range(reads))


def sized(app: App, *parts: bytes, **more: bytes) -> None:
    app.parts = list(parts)
    app.headers = [
        (b"content-length", b"%d" % sum(map(len, parts))),
        *((key.replace("_", "-").encode(), value) for key, value in more.items()),
    ]


def test_head_and_body_are_one_write(app: App, address: tuple[str, int]) -> None:
    sized(app, b"hello", x_model=b"digits")
    for _ in range(20):
        answer = exchange(address)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nx-model: digits\r\n" in answer and answer.endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("parts", [(b"a" * JOINED_BYTES, b"b" * 9), (b"a" * (JOINED_BYTES + 1),), (b"", b"late"), (b"",)])
def test_parts_of_any_size_arrive_whole(app: App, address: tuple[str, int], parts: tuple[bytes, ...]) -> None:
    sized(app, *parts)
    answer = b""
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while block := client.recv(1 << 20):
            answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"".join(parts) and b"connection: close" in head


def test_connections_are_kept_until_the_server_closes(app: App, duck: LameDuck, address: tuple[str, int]) -> None:
    sized(app, b"one")
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(address, timeout=10) as client:
        for _ in range(3):
            client.sendall(request)
            assert client.recv(4096).endswith(b"one")
        duck.closing = True
        client.sendall(request)
        assert b"connection: close" in client.recv(4096)
        assert client.recv(1) == b""


def test_an_answer_without_a_length_is_chunked_and_head_has_no_body(app: App, address: tuple[str, int]) -> None:
    app.headers, app.parts = [(b"x-a", b"1")], [b"ab", b"cd"]
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"transfer-encoding: chunked" in answer and answer.endswith(b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n")
    sized(app, b"hello")
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"content-length: 5" in answer and answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: x", b"a\nb", b"a\rb"])
def test_a_line_break_in_a_header_never_leaves(app: App, address: tuple[str, int], value: bytes) -> None:
    sized(app, b"hello", x_name=value)
    answer = exchange(address)
    assert b"500" in answer.split(b"\r\n")[0] and b"set-cookie" not in answer
    assert "line break" in str(app.errors[0])


@pytest.mark.parametrize(("length", "fault"), [(4, "longer"), (6, "shorter")])
def test_a_body_of_another_length_ends_the_connection(app: App, address: tuple[str, int], length: int, fault: str) -> None:
    app.headers, app.parts = [(b"content-length", b"%d" % length)], [b"hello"]
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert fault in str(app.errors[0])
    assert not answer if fault == "longer" else answer.endswith(b"hello")
