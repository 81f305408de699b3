"""The wire codec under whatever comes: what is right goes round whole, and all else ends in our own errors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.wire import choose_encoding, decompress, encode_response, parse_content_encoding, parse_header_length, parse_infer, validate
from app.domain import DATATYPE_SIZES, Signature, Tensor
from app.errors import HoneError
from tests.wire_bodies import JSON_DATATYPES, NUMPY, TWO, binary_body, elements, json_body, json_reply, one, result


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, list[int], bytes]:
    datatype = draw(st.sampled_from([*NUMPY, "BF16", "BYTES"]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    if datatype == "BYTES":
        return datatype, shape, elements(*draw(st.lists(st.binary(max_size=8), min_size=count, max_size=count)))
    size = count * DATATYPE_SIZES[datatype]
    data = draw(st.binary(min_size=size, max_size=size))
    return datatype, shape, bytes(byte & 1 for byte in data) if datatype == "BOOL" else data


@given(arrays())
@settings(deadline=None)
def test_binary_goes_round_whole(tensor: tuple[str, list[int], bytes]) -> None:
    datatype, shape, data = tensor
    body, header = binary_body(("x", datatype, shape, data), parameters={"binary_data_output": True})
    parsed = parse_infer(body, header)
    x = parsed.request.inputs[0]
    assert (x.datatype, list(x.shape), bytes(x.data)) == (datatype, shape, data)
    reply = encode_response(result(Tensor("y", datatype, x.shape, x.data)), parsed)
    assert bytes(reply.parts[1]) == data and reply.size == sum(map(len, reply.parts))


@st.composite
def values(draw: st.DrawFn) -> tuple[str, list[int], list[Any]]:
    datatype = draw(st.sampled_from([*JSON_DATATYPES, "BYTES"]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    if datatype == "BYTES":
        item: st.SearchStrategy[Any] = st.text(max_size=6)
    elif datatype == "BOOL":
        item = st.booleans()
    elif datatype in ("FP32", "FP64"):
        item = st.floats(allow_nan=False, allow_infinity=False, width=32 if datatype == "FP32" else 64)
    else:
        info = np.iinfo(NUMPY[datatype])
        item = st.integers(int(info.min), int(info.max))
    return datatype, shape, draw(st.lists(item, min_size=count, max_size=count))


def nest(flat: list[Any], shape: list[int]) -> Any:
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    step = math.prod(shape[1:])
    return [nest(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


@given(values(), st.booleans())
@settings(deadline=None)
def test_json_goes_round_whole(tensor: tuple[str, list[int], list[Any]], nested: bool) -> None:
    datatype, shape, flat = tensor
    data = nest(flat, shape) if nested else flat
    parsed = parse_infer(json_body(("x", datatype, shape, data)), None)
    x = parsed.request.inputs[0]
    output = json_reply(parsed, Tensor("y", datatype, x.shape, x.data))["outputs"][0]
    back = np.array(output["data"], NUMPY[datatype]).tolist() if datatype in ("FP32", "FP64") else output["data"]
    assert output["shape"] == shape and back == flat  # 55220030.0 is the short form of the float that 55220032.0 is, too


SIGNATURES = [None, one("x", "FP32", -1, 4), one("x", "BYTES", -1), one("x", "INT64", -1, -1, -1)]
HEADERS = st.one_of(st.none(), st.integers(0, 300))


@given(st.binary(max_size=200), HEADERS, st.sampled_from(SIGNATURES))
@settings(max_examples=300, deadline=None)
def test_whatever_the_bytes_only_our_own_errors_come(body: bytes, header: int | None, signature: Signature | None) -> None:
    try:
        parse_infer(body, header, signature)
    except HoneError:
        pass


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "shape", "data", "parameters", "q"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.just("x") | JSONISH,
            "datatype": st.sampled_from([*NUMPY, "BYTES", "BF16"]) | JSONISH,
            "shape": st.lists(st.integers(0, 3), max_size=3) | JSONISH,
            "data": st.lists(st.integers(-9, 300), max_size=6) | JSONISH,
            "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "q"]), st.integers(-1, 9) | JSONISH, max_size=2) | JSONISH,
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.text(max_size=3) | JSONISH,
            "parameters": st.dictionaries(st.sampled_from(["priority", "timeout", "binary_data_output"]), JSONISH, max_size=3) | JSONISH,
            "outputs": st.lists(st.fixed_dictionaries({"name": st.just("y") | JSONISH}, optional={"parameters": JSONISH}), max_size=2)
            | JSONISH,
        },
    ),
    st.binary(max_size=12),
)
@settings(max_examples=400, deadline=None)
def test_whatever_the_json_only_our_own_errors_come(tensor: dict[str, Any], top: dict[str, Any], tail: bytes) -> None:
    head = json.dumps({"inputs": [tensor], **top}).encode()
    try:
        parsed = parse_infer(head + tail, len(head) if tail else None)
        validate(parsed.request, SIGNATURES[1] or TWO)
    except HoneError:
        pass


@given(st.binary(max_size=100), st.sampled_from(["gzip", "deflate"]))
@settings(deadline=None)
def test_whatever_is_unpacked_only_our_own_errors_come(body: bytes, coding: str) -> None:
    try:
        decompress(body, coding, 1000)
    except HoneError:
        pass


@given(st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None)
def test_whatever_the_headers_only_our_own_errors_come(accept: str, encoding: str) -> None:
    choose_encoding(accept)
    try:
        parse_content_encoding(encoding)
        parse_header_length(encoding)
    except HoneError:
        pass
