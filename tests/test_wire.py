"""The wire codec: every form of the protocol, the right values of real trouble (integers out of range, empty bodies, scalars, NaN, strings)."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.wire import (
    ParsedRequest,
    Reply,
    check_reply_form,
    choose_encoding,
    compress,
    count_non_finite,
    decompress,
    encode_response,
    parse_content_encoding,
    parse_header_length,
    parse_infer,
    validate,
)
from app.domain import DATATYPE_SIZES, InferenceRequest, InferenceResult, Signature, Tensor, TensorSpec
from app.errors import HoneError, InvalidRequest, PayloadTooLarge, Unsupported, UnsupportedMediaType

NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8",
    "FP16": "f2", "FP32": "f4", "FP64": "f8",
}  # fmt: skip
JSON_DATATYPES = [name for name in NUMPY if name != "FP16"]


def json_body(*tensors: tuple[str, str, list[int], Any], **top: Any) -> bytes:
    return json.dumps({"inputs": [dict(zip(("name", "datatype", "shape", "data"), t, strict=True)) for t in tensors], **top}).encode()


def binary_body(*tensors: tuple[str, str, list[int], bytes], **top: Any) -> tuple[bytes, int]:
    inputs = [{"name": n, "datatype": d, "shape": s, "parameters": {"binary_data_size": len(b)}} for n, d, s, b in tensors]
    head = json.dumps({"inputs": inputs, **top}).encode()
    return head + b"".join(t[3] for t in tensors), len(head)


def elements(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def one(name: str, datatype: str, *shape: int, rows: bool = False) -> Signature:
    return Signature((TensorSpec(name, datatype, shape),), (TensorSpec("y", datatype, shape),), batchable=rows)


def result(*outputs: Tensor) -> InferenceResult:
    return InferenceResult(list(outputs), "m", "1", 1, 0.0, 0.0, 1)


def json_reply(parsed: ParsedRequest, *outputs: Tensor) -> Any:
    reply = encode_response(result(*outputs), parsed)
    return json.loads(b"".join(reply.parts))


def refused(body: bytes, header_length: int | None = None, signature: Signature | None = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse_infer(body, header_length, signature)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [256, -1, 1.5, 1.0, True, "7", None, 2**64, 10**400, {}, [1, 2]])
def test_an_integer_that_does_not_fit_is_refused_by_name_place_and_range(value: Any) -> None:
    text = refused(json_body(("pixels", "UINT8", [1, 3], [1, value, 2])))
    assert "pixels" in text and "element 1" in text and "0 to 255" in text


@pytest.mark.parametrize(
    ("value", "quoted"),
    [(256, "256"), (True, "true"), (None, "null"), ("7", "'7'"), (1.5, "1.5"), (2**64, "18446744073709551616;"), (10**400, "1000")],
)
def test_the_refused_value_is_quoted(value: Any, quoted: str) -> None:
    assert f"element 0 is {quoted}" in refused(json_body(("x", "UINT8", [1], [value])))


def test_the_proper_nesting_of_one_element_is_not_a_fault() -> None:
    assert bytes(parse_infer(json_body(("x", "UINT8", [1, 1], [[255]])), None).request.inputs[0].data) == b"\xff"


@pytest.mark.parametrize("datatype", [d for d in JSON_DATATYPES if "INT" in d])
def test_integers_reach_exactly_to_their_limits(datatype: str) -> None:
    info = np.iinfo(NUMPY[datatype])
    low, high = int(info.min), int(info.max)
    tensor = parse_infer(json_body(("x", datatype, [2], [low, high])), None).request.inputs[0]
    assert np.frombuffer(tensor.data, NUMPY[datatype]).tolist() == [low, high]
    assert str(high) in refused(json_body(("x", datatype, [1], [high + 1])))
    assert str(low) in refused(json_body(("x", datatype, [1], [low - 1])))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400])
def test_floats_that_json_cannot_hold_are_refused_with_the_remedy(literal: str) -> None:
    body = b'{"inputs":[{"name":"x","datatype":"FP64","shape":[2],"data":[1,%s]}]}' % literal.encode()
    text = refused(body)
    assert "'x'" in text and "element 1" in text


def test_nan_in_json_points_to_the_binary_form() -> None:
    assert "binary" in refused(b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}')


@pytest.mark.parametrize("value", [1e39, -1e39, True, False, None, "1", [1.0], {}])
def test_a_float_that_does_not_fit_is_refused(value: Any) -> None:
    assert "element 1" in refused(json_body(("x", "FP32", [2], [0.5, value])))


def test_integers_and_rounding_are_fine_in_float_tensors() -> None:
    data = parse_infer(json_body(("x", "FP32", [3], [1, 0.1, 1e-60])), None).request.inputs[0].data
    assert np.frombuffer(data, "f4").tolist() == [1.0, np.float32(0.1), 0.0]


def test_booleans_are_true_false_one_and_zero() -> None:
    assert bytes(parse_infer(json_body(("x", "BOOL", [4], [True, False, 1, 0])), None).request.inputs[0].data) == b"\1\0\1\0"
    for wrong in (2, "true", 1.0, None):
        assert "element 0" in refused(json_body(("x", "BOOL", [1], [wrong])))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form(datatype: str) -> None:
    assert "binary" in refused(json_body(("x", datatype, [1], [1.0])))


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_data_is_flat_or_nested(data: Any) -> None:
    assert np.frombuffer(parse_infer(json_body(("x", "INT32", [2, 2], data)), None).request.inputs[0].data, "i4").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2, 3, 4]],
        [[1], [2], [3], [4]],
        [[1, 2], [3]],
        [[1, 2], 3, 4],
        [[1, 2], None],
        [[1, 2], False],
        [[[1, 2], [3, 4]]],
        [1, 2, 3],
        [1, 2, [3], 4],
        1,
        "1234",
        {},
        None,
    ],
)
def test_nesting_that_contradicts_the_shape_is_refused(data: Any) -> None:
    assert "'x'" in refused(json_body(("x", "INT32", [2, 2], data)))


@pytest.mark.parametrize("shape", [[-1], [2.0], [True], ["2"], None, 2, [1] * 65, [2**63], [0], [3]])
def test_a_shape_that_is_none_or_not_the_datas_is_refused(shape: Any) -> None:
    assert "shape" in refused(json_body(("x", "FP32", shape, [1, 2])))


@pytest.mark.parametrize("data", [3, [3]])
def test_scalars_have_an_empty_shape(data: Any) -> None:
    tensor = parse_infer(json_body(("s", "FP32", [], data)), None).request.inputs[0]
    assert tensor.shape == () and tensor.data == struct.pack("<f", 3)


def test_zero_sized_tensors_are_tensors() -> None:
    cases: list[tuple[list[int], list[Any]]] = [([0, 4], []), ([2, 0], [[], []]), ([2, 0], [])]
    for shape, data in cases:
        tensor = parse_infer(json_body(("x", "FP32", shape, data)), None).request.inputs[0]
        assert tensor.shape == tuple(shape) and len(tensor.data) == 0


BROKEN = [
    b"", b"  \n", b"\0", b"null", b"[]", b'"x"', b"1", b"{", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b'{"inputs":{}}', b'{"inputs":[]}',
    b'{"inputs":[{}]}', b'{"inputs":[null]}', b"[" * 100_000, b'{"inputs":' * 50_000, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":'
    + b"[" * 50_000, b'{"inputs":[{"name":"\\ud800","datatype":"FP32","shape":[1],"data":[1]}]}', b'{"inputs":[{"name":"x"}]}',
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1]}]}', b'{"inputs":[{"name":"x","datatype":"FP99","shape":[1],"data":[1]}]}',
    b'{"inputs":[{"name":"x","datatype":["FP32"],"shape":[1],"data":[1]}]}', b'{"inputs":[{"name":"","datatype":"FP32","shape":[1],"data":[1]}]}',
]  # fmt: skip


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_broken_bodies_are_refused_with_a_line_that_helps(body: bytes, kind: type) -> None:
    refused(kind(body))


def test_duplicate_and_unknown_names() -> None:
    x = ("x", "FP32", [1], [1.0])
    assert "twice" in refused(json_body(x, x))
    assert "twice" in refused(json_body(x, outputs=[{"name": "y"}, {"name": "y"}]))
    assert parse_infer(json_body(x, model_name="m", extra=1), None).request.inputs[0].name == "x"


# ---- options ---------------------------------------------------------------------------------------------------------


def test_id_is_echoed_only_if_it_came() -> None:
    y = Tensor("y", "FP32", (1,), struct.pack("<f", 1))
    x = ("x", "FP32", [1], [1.0])
    assert "id" not in json_reply(parse_infer(json_body(x), None), y)
    assert json_reply(parse_infer(json_body(x, id=""), None), y)["id"] == ""
    assert json_reply(parse_infer(json_body(x, id="é7"), None), y)["id"] == "é7"
    assert "id" in refused(json_body(x, id=7))


def test_priority_and_timeout() -> None:
    body = json_body(("x", "FP32", [1], [1.0]), parameters={"priority": 2, "timeout": 1_500_000, "sequence_id": 0, "mine": "ignored"})
    request = parse_infer(body, None, received_at=10.0).request
    assert (request.priority, request.deadline, request.received_at) == (2, 11.5, 10.0)
    assert parse_infer(json_body(("x", "FP32", [1], [1.0]), parameters={"timeout": 0}), None).request.deadline is None
    for wrong in (
        {"priority": -1},
        {"priority": "1"},
        {"timeout": -5},
        {"timeout": 0.5},
        {"timeout": 2**63},
        {"binary_data_output": 1},
        [1],
    ):
        refused(json_body(("x", "FP32", [1], [1.0]), parameters=wrong))


def test_outputs_are_chosen_and_override_the_default_form() -> None:
    outputs = [{"name": "b"}, {"name": "a", "parameters": {"binary_data": False}}]
    parsed = parse_infer(json_body(("x", "FP32", [1], [1.0]), outputs=outputs, parameters={"binary_data_output": True}), None)
    assert parsed.request.outputs == ("b", "a")
    four = struct.pack("<f", 4)
    reply = encode_response(
        result(Tensor("a", "FP32", (1,), four), Tensor("b", "FP32", (1,), four), Tensor("c", "FP32", (1,), four)), parsed
    )
    head = orjson.loads(reply.parts[0])
    assert [output["name"] for output in head["outputs"]] == ["b", "a"]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 4} and "data" not in head["outputs"][0]
    assert head["outputs"][1]["data"] == [4.0]
    headers = dict(reply.headers)
    assert headers[b"inference-header-content-length"] == b"%d" % len(reply.parts[0])
    assert int(headers[b"content-length"]) == reply.size == sum(map(len, reply.parts))


@pytest.mark.parametrize(
    "outputs", [{}, "y", ["y"], [{}], [{"name": 1}], [{"name": "y", "parameters": {"binary_data": 1}}], [{"name": "y", "parameters": 1}]]
)
def test_malformed_outputs(outputs: Any) -> None:
    if outputs:
        refused(json_body(("x", "FP32", [1], [1.0]), outputs=outputs))
    assert parse_infer(json_body(("x", "FP32", [1], [1.0]), outputs=[]), None).outputs is None


def test_what_cannot_be_honoured_is_not_ignored() -> None:
    x = ("x", "FP32", [1], [1.0])
    for parameters in ({"classification": 3}, {"shared_memory_region": "r"}):
        with pytest.raises(Unsupported):
            parse_infer(json_body(x, outputs=[{"name": "y", "parameters": parameters}]), None)
    with pytest.raises(Unsupported):
        parse_infer(b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"parameters":{"shared_memory_region":"r"}}]}', None)


# ---- binary ----------------------------------------------------------------------------------------------------------


def test_binary_tensors_are_slices_of_the_body() -> None:
    body, header = binary_body(("a", "UINT32", [2, 2], bytes(range(16))), ("b", "BOOL", [3], b"\1\0\1"))
    a, b = parse_infer(body, header).request.inputs
    assert isinstance(a.data, memoryview) and a.data.obj is body
    assert bytes(a.data) == bytes(range(16)) and bytes(b.data) == b"\1\0\1"


def test_json_and_binary_mix() -> None:
    inputs = [
        {"name": "a", "datatype": "INT8", "shape": [2], "data": [1, -1]},
        {"name": "b", "datatype": "FP16", "shape": [1], "parameters": {"binary_data_size": 2}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    a, b = parse_infer(head + b"\0\x3c", len(head)).request.inputs
    assert bytes(a.data) == b"\1\xff" and bytes(b.data) == b"\0\x3c"


def test_a_header_length_of_the_whole_body_is_plain_json() -> None:
    body = json_body(("x", "FP32", [1], [1.0]), id="")
    assert parse_infer(body, len(body)).id == ""


def test_sizes_that_do_not_add_up() -> None:
    body, header = binary_body(("x", "FP32", [1, 4], bytes(16)))
    for wrong, length in (
        (body + b"\0", header),
        (body[:-1], header),
        (body, header - 1),
        (body, header + 1),
        (body, len(body) + 1),
        (body, None),
    ):
        refused(wrong, length)
    for size in (15, 17, -1, "16", 1.0, True, 2**70):
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": size}}]
        head = json.dumps({"inputs": inputs}).encode()
        refused(head + bytes(16), len(head))
    wrong_shape, header = binary_body(("x", "FP32", [1, 5], bytes(16)))
    assert "20 bytes" in refused(wrong_shape, header)
    both = b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[1],"data":[1],"parameters":{"binary_data_size":1}}]}'
    assert "both" in refused(both + b"\1", len(both))
    assert "Inference-Header-Content-Length" in refused(both.replace(b'"data":[1],', b""))


def test_a_bool_byte_is_zero_or_one() -> None:
    body, header = binary_body(("x", "BOOL", [2], b"\1\2"))
    assert "element 1" in refused(body, header)


STRINGS = [text.encode() for text in ("accused’s", "模型", "𝛑", "", "a\0b", "e\u0301")]


def test_strings_return_as_they_came() -> None:
    body, header = binary_body(("x", "BYTES", [6], elements(*STRINGS)))
    parsed = parse_infer(body, header)
    assert bytes(parsed.request.inputs[0].data) == elements(*STRINGS)
    same = parse_infer(json_body(("x", "BYTES", [6], [s.decode() for s in STRINGS])), None).request.inputs[0]
    assert same.data == elements(*STRINGS)
    assert json_reply(parsed, Tensor("y", "BYTES", (6,), same.data))["outputs"][0]["data"] == [s.decode() for s in STRINGS]


def test_bytes_that_are_no_text_stay_whole_in_binary_and_are_refused_in_json() -> None:
    body, header = binary_body(("x", "BYTES", [1], elements(b"\xff\xfe\x80")))
    parsed = parse_infer(body, header)
    data = parsed.request.inputs[0].data
    assert bytes(data) == elements(b"\xff\xfe\x80")
    with pytest.raises(InvalidRequest, match="binary"):
        encode_response(result(Tensor("y", "BYTES", (1,), data)), parsed)


@pytest.mark.parametrize("data", [b"\1", b"\5\0\0\0ab", b"\xff\xff\xff\xff", elements(b"a"), elements(b"a", b"b", b"c"), b""])
def test_string_lengths_are_checked(data: bytes) -> None:
    body, header = binary_body(("x", "BYTES", [2], data))
    assert "'x'" in refused(body, header)


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "²", "9" * 30, b"\xff"])
def test_a_header_length_that_is_no_number(value: str | bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_header_length(value)


def test_header_length_values() -> None:
    assert (parse_header_length(None), parse_header_length(b"0"), parse_header_length("117")) == (None, 0, 117)


# ---- raw mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signature", "body", "shape"),
    [
        (one("x", "FP32", -1, 4), bytes(16), (1, 4)),
        (one("x", "FP32", -1, 4), bytes(32), (2, 4)),
        (one("x", "FP32", -1, -1), bytes(12), (1, 3)),
        (one("x", "FP32", 2, 2), bytes(16), (2, 2)),
        (one("x", "FP32"), bytes(4), ()),
        (one("x", "UINT8", -1), b"", (0,)),
    ],
)
def test_a_raw_body_takes_its_shape_from_the_model(signature: Signature, body: bytes, shape: tuple[int, ...]) -> None:
    parsed = parse_infer(body, 0, signature)
    assert parsed.request.inputs[0].shape == shape and parsed.binary_default
    assert validate(parsed.request, signature) >= 0


@pytest.mark.parametrize("shape", [(-1,), (1,), (-1, 1)])
def test_a_raw_body_for_strings_is_one_string(shape: tuple[int, ...]) -> None:
    tensor = parse_infer(b"427", 0, one("x", "BYTES", *shape)).request.inputs[0]
    assert tensor.shape == (1,) * len(shape) and tensor.data == elements(b"427")


@pytest.mark.parametrize(
    ("signature", "size"),
    [
        (None, 4),
        (Signature((), ()), 4),
        (Signature((TensorSpec("a", "FP32", (1,)), TensorSpec("b", "FP32", (1,))), ()), 4),
        (one("x", "FP32", -1, 4), 15),
        (one("x", "FP32", 1, -1, -1), 4),
        (one("x", "FP32", 2), 4),
        (one("x", "FP32", -1, 0), 4),
        (one("x", "BYTES", 2), 4),
    ],
)
def test_a_raw_body_whose_shape_is_unknown_is_refused(signature: Signature | None, size: int) -> None:
    refused(bytes(size), 0, signature)


# ---- fitness for a model ---------------------------------------------------------------------------------------------

TWO = Signature(
    (TensorSpec("a", "FP32", (-1, 4)), TensorSpec("w", "FP32", (4,), optional=True)),
    (TensorSpec("y", "FP32", (-1, 4)), TensorSpec("h", "FP16", (-1,))),
    batchable=False,
)


def request(*tensors: tuple[str, str, tuple[int, ...]], outputs: tuple[str, ...] | None = None) -> InferenceRequest:
    return InferenceRequest([Tensor(n, d, s, bytes(math.prod(s) * DATATYPE_SIZES[d])) for n, d, s in tensors], outputs=outputs)


def test_optional_inputs_may_be_absent_and_free_dimensions_are_free() -> None:
    validate(request(("a", "FP32", (0, 4))), TWO)
    validate(request(("w", "FP32", (4,)), ("a", "FP32", (9, 4)), outputs=("h",)), TWO)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (request(("w", "FP32", (4,))), ["'a'", "missing"]),
        (request(("a", "FP32", (1, 4)), ("z", "FP32", (1,))), ["'z'", "'a'"]),
        (request(("a", "FP64", (1, 4))), ["FP64", "FP32"]),
        (request(("a", "FP32", (4,))), ["1 dimensions", "2"]),
        (request(("a", "FP32", (1, 5))), ["axis 1", "5", "4"]),
        (request(("a", "FP32", (1, 4)), outputs=("q",)), ["'q'", "'y'", "'h'"]),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(wrong: InferenceRequest, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(wrong, TWO)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rows_are_counted_and_equal_where_requests_share_calls() -> None:
    signature = Signature((TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT8", (-1,))), (), batchable=True)
    assert validate(request(("a", "FP32", (3, 2)), ("b", "INT8", (3,))), signature) == 3
    with pytest.raises(InvalidRequest, match="rows"):
        validate(request(("a", "FP32", (3, 2)), ("b", "INT8", (2,))), signature)
    unbatched = Signature(signature.inputs, ())
    assert validate(request(("a", "FP32", (3, 2)), ("b", "INT8", (2,))), unbatched) == 1


def test_a_scalar_is_not_a_row() -> None:
    with pytest.raises(InvalidRequest, match="dimensions"):
        validate(request(("s", "FP32", (1,))), one("s", "FP32"))


def test_half_float_outputs_must_be_asked_for_as_binary() -> None:
    x = ("a", "FP32", [1, 4], [1.0] * 4)
    check_reply_form(parse_infer(json_body(x, parameters={"binary_data_output": True}), None), TWO)
    check_reply_form(parse_infer(json_body(x, outputs=[{"name": "y"}]), None), TWO)
    check_reply_form(parse_infer(json_body(x, outputs=[{"name": "h", "parameters": {"binary_data": True}}]), None), TWO)
    for top in ({}, {"outputs": [{"name": "h"}]}):
        parsed = parse_infer(json_body(x, **top), None)
        with pytest.raises(InvalidRequest, match="binary_data"):
            check_reply_form(parsed, TWO)
        with pytest.raises(InvalidRequest, match="binary_data"):
            encode_response(result(Tensor("h", "FP16", (1,), b"\0\0")), parse_infer(json_body(x), None))


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


# ---- properties ------------------------------------------------------------------------------------------------------


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
