"""Requests as JSON: the right values of real trouble (integers out of range, empty bodies, scalars, NaN), and their options."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest

from app.api.wire import encode_response, parse_infer
from app.domain import Tensor
from app.errors import Unsupported
from tests.wire_bodies import JSON_DATATYPES, NUMPY, json_body, json_reply, refused, result

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
        {"timeout": 2**64},
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
