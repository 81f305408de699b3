"""The protocol class in a real uvicorn server: bounds, timeouts, JSON errors, lost clients. Raw sockets, as trouble comes."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

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


# ---- what is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 70_000, 3_000_000])
def test_requests_are_answered_and_the_connection_kept(served: Running, size: int) -> None:
    with served.connect() as client:
        for _ in range(3):
            client.sendall(post("/echo", bytes(size)))
            status, headers, body = answer(client)
            assert (status, json.loads(body)) == (200, {"size": size}) and "connection" not in headers


def test_a_head_up_to_the_limit_is_allowed_in_any_pieces(served: Running) -> None:
    head = post("/echo", b"12345", b"X-Long: " + b"a" * 32_000 + b"\r\n")
    assert 32_000 < len(head) < 32 << 10
    for piece in (len(head), 1000, 31_999):
        with served.connect() as client:
            for at in range(0, len(head), piece):
                client.sendall(head[at : at + piece])
            assert json.loads(answer(client)[2]) == {"size": 5}


def test_a_large_body_right_behind_its_head_is_not_taken_for_headers(served: Running) -> None:
    with served.connect() as client:
        client.sendall(post("/echo", bytes(200_000)) + post("/echo", bytes(300_000)) + post("/echo", b""))
        assert [json.loads(body)["size"] for _, _, body in answers(client, 3)] == [200_000, 300_000, 0]


def test_many_pipelined_requests_are_not_one_large_head(served: Running) -> None:
    with served.connect() as client:
        one = post("/echo", b"x", b"X: " + b"y" * 900 + b"\r\n")
        sender = threading.Thread(target=client.sendall, args=(one * 200,))
        sender.start()
        assert all(status == 200 for status, _, _ in answers(client, 200))
        sender.join()


@pytest.mark.parametrize("chunk", [1, 7, 50_000])
def test_chunked_bodies_come_whole(served: Running, chunk: int) -> None:
    size = 100_000 if chunk > 1 else 20_000
    framed = b"".join(b"%x\r\n%b\r\n" % (min(chunk, size - at), bytes(min(chunk, size - at))) for at in range(0, size, chunk))
    with served.connect() as client:
        client.sendall(
            b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\nX-Trailer: kept out\r\n\r\n"
        )
        assert json.loads(answer(client)[2]) == {"size": size}
        assert not [name for name, _ in served.app.headers[-1] if name == b"x-trailer"]


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("size", [0, 5, 300_000])
@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_an_offer_of_another_protocol_is_declined_in_silence(served: Running, size: int, piece: int) -> None:
    offering, plain = post("/echo", bytes(size), OFFER), post("/echo", b"12")
    chunked = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\n3\r\nabc\r\n0\r\n\r\n"
    data = offering + plain + chunked + plain + b"GET /echo HTTP/1.1\r\n" + OFFER + b"\r\n" + plain
    with served.connect() as client:

        def send() -> None:
            for at in range(0, len(data), piece):
                client.sendall(data[at : at + piece])

        sender = threading.Thread(target=send)
        sender.start()
        assert [json.loads(body)["size"] for _, _, body in answers(client, 6)] == [size, 2, 3, 2, 0, 2]
        sender.join()


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_fifty_megabytes_of_headers_are_refused_before_the_app(served: Running) -> None:
    before = len(served.app.seen)
    with served.connect() as client:
        client.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\n")
        send_all_you_can(client, b"X-Many: " + b"a" * (1 << 20) + b"\r\n", 50)
        assert "headers have more than 32768 bytes" in refusal(client, 431)
        assert closed(client)
    assert len(served.app.seen) == before


def test_one_endless_header_is_refused(served: Running) -> None:
    with served.connect() as client:
        send_all_you_can(client, b"GET /echo HTTP/1.1\r\nX-One: " + b"a" * (50 << 20))
        refusal(client, 431)


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 100, b"\r\n" * 300])
def test_a_trickled_head_is_counted_as_a_whole(served: Running, piece: bytes) -> None:
    with served.connect() as client:
        if piece[:1] == b"a":
            client.sendall(b"GET /echo HTTP/1.1\r\n")
        for _ in range(100):
            send_all_you_can(client, piece)
            time.sleep(0.001)
        refusal(client, 431)


def test_a_large_head_behind_another_request_is_refused_and_does_not_spoil_its_answer(served: Running) -> None:
    with served.connect() as client:
        client.sendall(post("/echo", bytes(90_000)) + b"GET /late HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n")
        assert json.loads(answer(client)[2]) == {"size": 90_000}
        while rest := client.recv(65536):
            assert b" 200 " not in rest
    assert ("/late", 0) not in served.app.seen


def test_a_long_url_is_refused_as_such(served: Running) -> None:
    for length in (5000, 5 << 20):
        with served.connect() as client:
            send_all_you_can(client, b"GET /" + b"a" * length + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert "URL" in refusal(client, 414)


@pytest.mark.parametrize("kind", ["trailer", "trailers", "extension", "extensions"])
def test_trailers_and_chunk_extensions_are_bounded(served: Running, kind: str) -> None:
    start = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    flood = {
        "trailer": b"0\r\nX: " + b"a" * (20 << 20),
        "trailers": b"0\r\n" + b"X: y\r\n" * (4 << 20),
        "extension": b"1;a=" + b"b" * (20 << 20),
        "extensions": b"1;a=bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\nx\r\n" * (1 << 18),
    }[kind]
    with served.connect() as client:
        client.sendall(start)
        send_all_you_can(client, flood)
        assert "chunk" in refusal(client, 431)
    served.wait_until(lambda: served.app.running == 0)


# ---- malformed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FETCH / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    ],
)
def test_malformed_http_gets_a_json_error(served: Running, junk: bytes) -> None:
    with served.connect() as client:
        client.sendall(junk)
        assert refusal(client, 400)
        assert closed(client)


def test_a_refusal_carries_the_id_that_came(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nX-Request-Id: mine\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        status, headers, _ = answer(client)
        assert (status, headers["x-request-id"]) == (400, "mine")


def test_a_malformed_chunk_ends_the_request_that_it_belongs_to(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.sendall(b"zz\r\n")
        refusal(client, 400)
    served.wait_until(lambda: served.app.running == 0)


def test_junk_behind_a_request_does_not_spoil_its_answer(served: Running) -> None:
    with served.connect() as client:
        client.sendall(post("/echo", b"123") + b"\0\0junk\r\n\r\n")
        status, headers, body = answer(client)
        assert status == 200 and json.loads(body) == {"size": 3} and headers["connection"] == "close"
        assert closed(client)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([
            post("/echo", b"12"), post("/echo", b"1", OFFER), b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;x=y\r\na\r\n", b"0\r\n\r\n",
            b"GET /echo HTTP/1.1\r\n", b"A: b\r\n", b"\r\n", b"\n", b"Expect: 100-continue\r\n", b"Content-Length: 3\r\n", OFFER, b"\0", b"PUT",
        ]) | st.binary(max_size=20),
        max_size=8,
    ),
    st.integers(1, 60),
)  # fmt: skip
def test_whatever_is_sent_the_server_stays_whole(served: Running, parts: list[bytes], piece: int) -> None:
    data = b"".join(parts)
    with served.connect() as client:
        for at in range(0, len(data), piece):
            send_all_you_can(client, data[at : at + piece])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert not served.log.records, served.log.text


# ---- time ------------------------------------------------------------------------------------------------------------


def test_a_large_body_that_hardly_comes_is_ended_and_a_small_one_may_take_its_time() -> None:
    """What is announced is kept free in memory: a few idle connections must not keep all others out."""
    with serving(replace(LIMITS, body_timeout_s=60.0, stall_s=0.4)) as served, served.connect() as large, served.connect() as small:
        for client, size in ((large, 70_000), (small, 60_000)):
            client.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(100))
        assert "16384 bytes in 0.4 seconds" in refusal(large, 408)
        small.sendall(bytes(59_900))
        assert answer(small)[0] == 200


def test_slow_headers_are_refused(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"GET /echo HT")
        for piece in (b"TP/1.1\r\n", b"Host: x\r\n"):
            time.sleep(0.3)
            client.sendall(piece)
        assert "headers" in refusal(client, 408)
        assert closed(client)


def test_a_silent_connection_is_closed(served: Running) -> None:
    with served.connect() as client:
        assert client.recv(1) == b""


def test_a_body_that_never_comes_is_refused_and_the_app_told(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert "body" in refusal(client, 408)
    served.wait_until(lambda: "/slow" in served.app.left)


def test_a_kept_connection_may_be_used_again_after_the_header_timeout(served: Running) -> None:
    with served.connect() as client:
        for _ in range(2):
            client.sendall(post("/echo", b""))
            assert answer(client)[0] == 200
            time.sleep(1.8)


def test_a_reply_that_nobody_reads_is_given_up() -> None:
    with serving() as served, served.connect() as client:
        client.sendall(post("/huge", b""))
        served.wait_until(lambda: served.server.server_state.connections)
        served.wait_until(lambda: not served.server.server_state.connections)


# ---- early answers, lost clients, lame duck --------------------------------------------------------------------------


def test_an_answer_before_the_body_reaches_a_client_that_is_still_sending(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n")
        assert answer(client)[0] == 413
        client.sendall(bytes(20_000_000))
        client.sendall(post("/echo", b"12"))
        assert json.loads(answer(client)[2]) == {"size": 2}


def test_the_rest_of_a_refused_body_is_not_read_for_ever(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert answer(client)[0] == 413
        chunk, sent = b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20)), 0
        try:
            while sent < 400:
                client.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 200


def test_a_client_that_leaves_mid_body_is_noticed(served: Running) -> None:
    before = served.app.left.count("/leave")
    for _ in range(20):
        with served.connect() as client:
            client.sendall(b"POST /leave HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(5000))
    served.wait_until(lambda: served.app.left.count("/leave") == before + 20)
    served.wait_until(lambda: served.app.running == 0)


def test_a_client_that_leaves_while_it_waits_is_noticed(served: Running) -> None:
    before = served.app.left.count("/wait")
    with served.connect() as client:
        client.sendall(post("/wait", b""))
        served.wait_until(lambda: served.app.running == 1)
    served.wait_until(lambda: served.app.left.count("/wait") == before + 1)


def test_a_lame_duck_closes_after_each_answer() -> None:
    with serving() as served, served.connect() as client, served.connect() as other:
        client.sendall(post("/echo", b""))
        assert "connection" not in answer(client)[1]
        served.lame_duck.closing = True
        for one in (client, other):
            one.sendall(post("/echo", b"1"))
            status, headers, body = answer(one)
            assert (status, headers["connection"], json.loads(body)) == (200, "close", {"size": 1})
            assert closed(one)


def test_nothing_is_left_when_clients_are_gone(served: Running) -> None:
    served.wait_until(lambda: not served.server.server_state.connections)
    served.wait_until(lambda: served.app.running == 0)
    assert not served.server.server_state.tasks
    assert not served.log.records, served.log.text
