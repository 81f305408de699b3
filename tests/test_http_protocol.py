"""The protocol class in a real uvicorn server: whole requests, malformed ones, lost clients. Raw sockets, as trouble comes."""

from __future__ import annotations

import json
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.raw_http import Running, answer, answers, closed, post, refusal, send_all_you_can, served, serving

__all__ = ["served"]


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


def test_blanks_around_a_value_are_no_part_of_it(served: Running) -> None:
    with served.connect() as client:
        client.sendall(post("/echo", b"x", b"X-Padded: \t a b \t \r\n"))
        assert answer(client)[0] == 200
    assert (b"x-padded", b"a b") in served.app.headers[-1]


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


@pytest.mark.parametrize(
    ("head", "status", "word"),
    [
        (b"GET /echo HTTP/1.1\r\n", 400, "no Host headers"),
        (b"GET /echo HTTP/1.1\r\nHost: a\r\nHost: a\r\n", 400, "2 Host headers"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n", 501, "'gzip, chunked'"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501, "Content-Encoding"),
    ],
)
def test_a_head_that_a_proxy_may_read_otherwise_is_refused(served: Running, head: bytes, status: int, word: str) -> None:
    before = len(served.app.seen)
    with served.connect() as client:
        client.sendall(head + b"\r\n")
        assert word in refusal(client, status)
    with served.connect() as client:
        client.sendall(head + b"\r\n" + post("/echo", b"smuggled"))
        assert word in refusal(client, status) and closed(client)
    assert len(served.app.seen) == before


@pytest.mark.parametrize("head", [b"GET /echo HTTP/1.0\r\n", b"GET /echo HTTP/1.1\r\nHost:\r\n", b"GET /echo HTTP/1.0\r\nhost: x\r\n"])
def test_an_old_probe_without_a_host_is_answered(served: Running, head: bytes) -> None:
    with served.connect() as client:
        client.sendall(head + b"\r\n")
        assert answer(client)[0] == 200


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("size", [0, 5, 300_000])
@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_an_offer_of_another_protocol_is_declined_in_silence(served: Running, size: int, piece: int) -> None:
    offering, plain = post("/echo", bytes(size), OFFER), post("/echo", b"12")
    chunked = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\n3\r\nabc\r\n0\r\n\r\n"
    data = offering + plain + chunked + plain + b"GET /echo HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n" + plain
    with served.connect() as client:

        def send() -> None:
            for at in range(0, len(data), piece):
                client.sendall(data[at : at + piece])

        sender = threading.Thread(target=send)
        sender.start()
        assert [json.loads(body)["size"] for _, _, body in answers(client, 6)] == [size, 2, 3, 2, 0, 2]
        sender.join()


# ---- malformed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FETCH / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    ],
)
def test_malformed_http_gets_a_json_error(served: Running, junk: bytes) -> None:
    with served.connect() as client:
        client.sendall(junk)
        assert refusal(client, 400)
        assert closed(client)


def test_a_refusal_carries_the_id_that_came(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
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
            post("/echo", b"12"), post("/echo", b"1", OFFER), b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;x=y\r\na\r\n", b"0\r\n\r\n",
            b"GET /echo HTTP/1.1\r\nHost: x\r\n", b"A: b\r\n", b"\r\n", b"\n", b"Expect: 100-continue\r\n", b"Content-Length: 3\r\n", OFFER, b"\0", b"PUT",
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


# ---- early answers, lost clients, lame duck --------------------------------------------------------------------------


def test_an_answer_before_the_body_reaches_a_client_that_is_still_sending(served: Running) -> None:
    with served.connect() as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n")
        assert answer(client)[0] == 413
        client.sendall(bytes(20_000_000))
        client.sendall(post("/echo", b"12"))
        assert json.loads(answer(client)[2]) == {"size": 2}


ENDING = b"POST /early HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "head",
    [
        ENDING + b"Content-Length: 20000000\r\n\r\n",
        ENDING + b"Transfer-Encoding: chunked\r\n\r\n1312d00\r\n",
        b"POST /early HTTP/1.0\r\nContent-Length: 20000000\r\n\r\n",
    ],
)
def test_nor_is_it_lost_where_the_connection_ends_with_it(served: Running, head: bytes) -> None:
    with served.connect() as client:
        client.sendall(head)
        client.sendall(bytes(20_000_000))
        status, headers, _ = answer(client)
        assert status == 413 and headers["connection"] == "close"
        assert closed(client)


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


def test_a_client_that_leaves_with_requests_behind_the_one_it_waits_for_is_no_error_of_ours(served: Running) -> None:
    before = served.app.left.count("/wait")
    with served.connect() as client:
        client.sendall(post("/wait", b"") + post("/echo", b"x") * 3)
        served.wait_until(lambda: served.app.running == 1)
    served.wait_until(lambda: served.app.left.count("/wait") == before + 1 and not served.app.running)
    assert "without starting response" not in served.log.text and "never retrieved" not in served.log.text


def test_whole_requests_before_junk_are_answered_and_then_the_connection_ends(served: Running) -> None:
    broken = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"
    for junk in (b"\x16\x03\x01\r\n\r\n", broken):
        for count in (1, 2, 3):
            with served.connect() as client:
                client.sendall(post("/echo", b"12345") * count + junk)
                assert [json.loads(body)["size"] for _, _, body in answers(client, count)] == [5] * count
                assert closed(client)


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
