"""An infer reply, written: JSON, binary, or both, as the request chose for each output. Knows results and bytes, not how they are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.api.wire.request import ParsedRequest
from app.api.wire.tensors import unpack_json
from app.domain import Buffer, InferenceResult, Tensor

_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")
_SLICE_BYTES: Final = 1 << 20


@dataclass(slots=True)
class Reply:
    """Headers (content-length among them) and the body in parts that need no joining. `non_finite`: elements that JSON shows as null."""

    headers: list[tuple[bytes, bytes]]
    parts: list[Buffer]
    size: int
    non_finite: int = 0


def encode_response(result: InferenceResult, parsed: ParsedRequest) -> Reply:
    """The reply to `parsed`. Raises InvalidRequest where an output has no JSON form (FP16, BF16, bytes that are not UTF-8)."""
    outputs: list[dict[str, Any]] = []
    parts: list[Buffer] = [b""]
    non_finite, size = 0, 0
    for tensor, binary in chosen(result, parsed):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if binary:
            length = len(tensor.data)
            entry["parameters"] = {"binary_data_size": length}
            parts.append(tensor.data)
            size += length
        else:
            entry["data"], nulls = unpack_json(tensor)
            if nulls:
                entry["parameters"] = {"non_finite": nulls}
                non_finite += nulls
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": result.model, "model_version": result.version}
    if parsed.id is not None:
        document["id"] = parsed.id
    document["outputs"] = outputs
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    parts[0] = head
    size += len(head)
    length_header = (b"content-length", b"%d" % size)
    if len(parts) == 1:
        headers = [_JSON, length_header]
    else:
        headers = [_BINARY, (b"inference-header-content-length", b"%d" % len(head)), length_header]
    return Reply(headers, parts if size <= _SLICE_BYTES else in_slices(parts), size, non_finite)


def in_slices(parts: list[Buffer]) -> list[Buffer]:
    """The same bytes in parts of at most 1 MiB, so that no single write keeps the event loop busy for long."""
    views = (memoryview(part) for part in parts)
    return [view[at : at + _SLICE_BYTES] for view in views for at in range(0, len(view), _SLICE_BYTES)]


def chosen(result: InferenceResult, parsed: ParsedRequest) -> list[tuple[Tensor, bool]]:
    """The outputs of the reply, in the order asked for, each with whether it goes as binary."""
    if parsed.outputs is None:
        return [(tensor, parsed.binary_default) for tensor in result.outputs]
    by_name = {tensor.name: tensor for tensor in result.outputs}
    return [(by_name[choice.name], choice.binary) for choice in parsed.outputs]


def json_raw_bytes(result: InferenceResult, parsed: ParsedRequest) -> int:
    """Raw size of the outputs that are wanted as JSON: decides where the reply is written."""
    if parsed.outputs is None:
        return 0 if parsed.binary_default else sum([len(tensor.data) for tensor in result.outputs])
    return sum([len(tensor.data) for tensor, binary in chosen(result, parsed) if not binary])
