"""Replies: their form in JSON and binary, and bodies packed both ways, within limits."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from app.api.wire import (
    Reply,
    choose_encoding,
    compress,
    count_non_finite,
    decompress,
    encode_response,
    parse_content_encoding,
    parse_infer,
)
from app.domain import Tensor
from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from tests.wire_bodies import NUMPY, json_body, json_reply, result

# ---- replies ---------------------------------------------------------------------------------------------------------


def test_not_a_number_is_null_and_counted_in_json_and_whole_in_binary() -> None:
    values = np.array([np.nan, -np.inf, 0], "f4")
    tensor = Tensor("y", "FP32", (3,), values.tobytes())
    x = ("x", "FP32", [1], [1.0])
    output = json_reply(parse_infer(json_body(x), None), tensor)["outputs"][0]
    assert output["data"] == [None, None, 0.0] and output["parameters"] == {"non_finite": 2}
    binary = encode_response(result(tensor), parse_infer(json_body(x, parameters={"binary_data_output": True}), None))
    assert bytes(binary.parts[1]) == values.tobytes()


@pytest.mark.parametrize("size", [3, 1000])
def test_non_finite_elements_are_counted(size: int) -> None:
    values = np.ones(size)
    values[[0, 2]] = np.nan, np.inf
    for datatype in ("FP16", "FP32", "FP64"):
        assert count_non_finite(Tensor("y", datatype, (size,), values.astype(NUMPY[datatype]).tobytes())) == 2
    brain = (values.astype("f4").view("u4") >> 16).astype("u2")
    assert count_non_finite(Tensor("y", "BF16", (size,), brain.tobytes())) == 2
    assert count_non_finite(Tensor("y", "INT32", (size,), np.ones(size, "i4").tobytes())) == 0


def test_floats_are_written_as_short_as_they_are_exact() -> None:
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0])), None)
    reply = encode_response(result(Tensor("y", "FP32", (1,), np.array([0.1], "f4").tobytes())), parsed)
    assert b'"data":[0.1]' in reply.parts[0]


def test_a_scalar_output_keeps_its_empty_shape() -> None:
    output = json_reply(parse_infer(json_body(("x", "FP32", [1], [1.0])), None), Tensor("z", "FP32", (), struct.pack("<f", 2.5)))[
        "outputs"
    ][0]
    assert output["shape"] == [] and output["data"] == [2.5]


def test_an_output_at_an_odd_address_is_read_all_the_same() -> None:
    memory = memoryview(b"\0" + np.array([1.5, 2.5], "f4").tobytes())[1:]
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0])), None)
    assert json_reply(parsed, Tensor("y", "FP32", (2,), memory))["outputs"][0]["data"] == [1.5, 2.5]


def test_large_replies_are_written_in_slices_of_the_outputs_own_memory() -> None:
    data = np.random.default_rng(0).integers(0, 90, 5_000_001, "u1").tobytes()
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0]), parameters={"binary_data_output": True}), None)
    reply = encode_response(result(Tensor("y", "UINT8", (5_000_001,), data), Tensor("e", "UINT8", (0,), b"")), parsed)
    assert max(map(len, reply.parts)) == 1 << 20 and b"".join(reply.parts[1:]) == data
    assert all(isinstance(part, memoryview) and part.obj is data for part in reply.parts[1:])
    packed = compress(reply, "gzip")
    assert gzip.decompress(b"".join(packed.parts)) == b"".join(reply.parts) and len(packed.parts) > 2


# ---- compression -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (None, None), ("", None), ("gzip", "gzip"), ("deflate", "deflate"), ("gzip;q=0", None), ("br, *;q=0", None), ("br", None), ("*", "gzip"),
        ("gzip, deflate, br, zstd", "gzip"), ("gzip;q=0.2, deflate;q=0.8", "deflate"), ("GZIP; Q=0.5", "gzip"), ("gzip;q=0, *", "deflate"),
        ("identity, gzip;q=0.5", None), ("gzip;q=x", None), ("x-gzip", "gzip"), ("gzip;q=nan", None), (b"gzip;q=1.000", "gzip"), (",;,=", None),
    ],
)  # fmt: skip
def test_the_coding_of_a_reply_is_the_clients_choice(accept: str | bytes | None, coding: str | None) -> None:
    assert choose_encoding(accept) == coding


def large_reply() -> Reply:
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0]), parameters={"binary_data_output": True}), None)
    return encode_response(result(Tensor("y", "FP32", (1, 4096), np.ones(4096, "f4").tobytes())), parsed)


@pytest.mark.parametrize(("coding", "unpack"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_a_packed_reply_says_so_and_its_length_header_counts_the_unpacked_json(coding: str, unpack: Any) -> None:
    plain = large_reply()
    packed = compress(plain, coding)
    headers = dict(packed.headers)
    whole = unpack(b"".join(packed.parts))
    assert whole == b"".join(plain.parts) and packed.size < plain.size
    assert headers[b"content-encoding"] == coding.encode() and int(headers[b"content-length"]) == packed.size == sum(map(len, packed.parts))
    head = int(headers[b"inference-header-content-length"])
    assert json.loads(whole[:head])["outputs"][0]["parameters"]["binary_data_size"] == len(whole) - head
    assert len([name for name, _ in packed.headers if name == b"content-length"]) == 1


def test_small_and_unpackable_replies_stay_plain() -> None:
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0]), parameters={"binary_data_output": True}), None)
    small = encode_response(result(Tensor("y", "FP32", (1,), bytes(4))), parsed)
    assert compress(small, "gzip") is small
    noise = np.random.default_rng(0).bytes(20000)
    reply = compress(encode_response(result(Tensor("y", "UINT8", (20000,), noise)), parsed), "gzip")
    assert b"content-encoding" not in dict(reply.headers) and bytes(reply.parts[1]) == noise


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(3_000_000), np.random.default_rng(1).bytes(300_000)], ids=["empty", "one", "zeros", "noise"]
)
def test_packed_bodies_unpack_within_the_limit_and_not_beyond(kind: str, data: bytes) -> None:
    coding, pack = PACKERS[kind]
    packed = pack(data)
    assert decompress(packed, coding, len(data)) == data
    if data:
        with pytest.raises(PayloadTooLarge):
            decompress(packed, coding, len(data) - 1)
    with pytest.raises(InvalidRequest):
        decompress(packed[:-1], coding, len(data))
    with pytest.raises(InvalidRequest):
        decompress(packed + b"tail", coding, len(data))


def test_a_bomb_costs_no_more_than_the_limit() -> None:
    bomb = gzip.compress(bytes(100_000_000))
    for body in (bomb, bomb * 3):
        with pytest.raises(PayloadTooLarge):
            decompress(body, "gzip", 1_000_000)


def test_gzip_members_join_but_not_without_end() -> None:
    assert decompress(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", 10) == b"ab"
    with pytest.raises(InvalidRequest):
        decompress(gzip.compress(b"") * 20_000, "gzip", 10)


def test_content_encodings() -> None:
    assert [parse_content_encoding(value) for value in (None, "", "identity", "gzip", b"GZIP", "deflate", "x-gzip")] == [
        None, None, None, "gzip", "gzip", "deflate", "gzip",
    ]  # fmt: skip
    for wrong in ("br", "gzip, gzip", "deflate, gzip", "zstd"):
        with pytest.raises(UnsupportedMediaType):
            parse_content_encoding(wrong)
