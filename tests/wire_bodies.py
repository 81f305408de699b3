"""Bodies of requests, and replies, as the tests of the wire codec build and read them."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from app.api.wire import ParsedRequest, encode_response, parse_infer
from app.domain import InferenceResult, Signature, Tensor, TensorSpec
from app.errors import InvalidRequest

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


TWO = Signature(
    (TensorSpec("a", "FP32", (-1, 4)), TensorSpec("w", "FP32", (4,), optional=True)),
    (TensorSpec("y", "FP32", (-1, 4)), TensorSpec("h", "FP16", (-1,))),
    batchable=False,
)
