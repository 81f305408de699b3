"""Requests with binary tensors or as a raw body, and what a model takes: sizes that do not add up, strings, shapes that do not fit."""

from __future__ import annotations

import json
import math

import pytest

from app.api.wire import check_reply_form, encode_response, parse_header_length, parse_infer, validate
from app.domain import DATATYPE_SIZES, InferenceRequest, Signature, Tensor, TensorSpec
from app.errors import InvalidRequest
from tests.wire_bodies import TWO, binary_body, elements, json_body, json_reply, one, refused, result

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
