"""Bounds and timeouts of the protocol class in a real uvicorn server: heads that never end, bodies that never come."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from tests.raw_http import LIMITS, Running, answer, closed, post, refusal, send_all_you_can, served, serving

__all__ = ["served"]


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


# ---- time ------------------------------------------------------------------------------------------------------------


def test_a_large_body_that_hardly_comes_is_ended_and_a_small_one_may_take_its_time() -> None:
    """What is announced is kept free in memory: a few idle connections must not keep all others out."""
    with serving(replace(LIMITS, body_timeout_s=60.0, stall_s=0.4)) as served, served.connect() as large, served.connect() as small:
        for client, size in ((large, 70_000), (small, 60_000)):
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(100))
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
