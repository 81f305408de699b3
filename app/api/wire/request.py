"""An infer request's body, read: JSON, the binary tensor extension, both mixed, or one raw tensor. Checks form, not fitness for a model.

Tensor bytes are never copied: a binary tensor is a slice of the body's memory. What Hone does not know at the top level or among
parameters is ignored (KServe's client sends `model_name`), what it cannot honour (shared memory, classification) is refused.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.api.wire.tensors import BINARY_REMEDY, bytes_element, check_raw, find_fault, pack_json, show
from app.domain import BYTES, DATATYPE_SIZES, Buffer, InferenceRequest, Signature, Tensor, TensorSpec
from app.errors import InvalidRequest, Unsupported

MAX_RANK: Final = 64
_EXPLAINED_BYTES: Final = 65536
_EXAMPLE: Final = '{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
_DATATYPES: Final = frozenset(DATATYPE_SIZES) | {BYTES}
_NO_PARAMETERS: Final[dict[str, Any]] = {}


@dataclass(slots=True)
class OutputChoice:
    """An output that the caller asked for by name, and the form that it shall have."""

    name: str
    binary: bool


@dataclass(slots=True)
class ParsedRequest:
    """A request and how its reply shall look. `id` is None where none came (then none is echoed), `outputs` where all are wanted."""

    request: InferenceRequest
    id: str | None
    outputs: tuple[OutputChoice, ...] | None
    binary_default: bool


def parse_header_length(value: bytes | str | None) -> int | None:
    """The header Inference-Header-Content-Length as a number; None where it did not come."""
    if value is None:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"Inference-Header-Content-Length is {show(text)}; it is the JSON part's length in bytes, 0 for a raw tensor")
    return int(text)


def parse_infer(
    body: Buffer, header_length: int | None, signature: Signature | None = None, received_at: float | None = None
) -> ParsedRequest:
    """Read the body of an infer request. Raises InvalidRequest or Unsupported, whatever the bytes.

    header_length: of the JSON part; None: the whole body is JSON; 0: the body is the one input of `signature`, raw.
    received_at: on time.monotonic()'s clock; deadlines count from it. Default: now.
    """
    now = time.monotonic() if received_at is None else received_at
    size = len(body)
    if header_length == 0:
        return _raw_request(body, signature, now)
    if header_length is None or header_length == size:
        head, view, at = body, None, size
    elif header_length > size:
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {header_length}, but the body has {size} bytes; it counts the JSON part alone"
        )
    else:
        view, at = memoryview(body), header_length
        head = view[:at]
    document = _load_object(head)
    inputs = document.get("inputs")
    if type(inputs) is not list or not (inputs or _takes_nothing(signature)):
        raise InvalidRequest(f"inputs is {show(inputs)}; a request has a list of one input or more, as in {_EXAMPLE}")
    tensors: list[Tensor] = []
    booleans: bool | None = None
    for item in inputs:
        name, datatype, shape, count, parameters = _describe(item)
        length = parameters.get("binary_data_size")
        if length is None:
            if "data" not in item:
                raise _no_data(name, parameters)
            if booleans is None:
                booleans = _may_hold_booleans(head)
            try:
                packed = pack_json(name, datatype, shape, count, item["data"], booleans)
            except InvalidRequest as error:
                raise _as_it_was_written(head, error) from None
            tensors.append(Tensor(name, datatype, shape, packed))
            continue
        data = _slice(name, item, view, at, length, size)
        check_raw(name, datatype, shape, count, data)
        tensors.append(Tensor(name, datatype, shape, data))
        at += length
    if at != size:
        raise InvalidRequest(
            f"{size - at} bytes of the body belong to no input; the JSON part and all binary_data_size together make the body's {size} bytes"
        )
    if len(tensors) > 1 and len({tensor.name for tensor in tensors}) != len(tensors):
        raise InvalidRequest(f"an input's name came twice among {show([tensor.name for tensor in tensors])}; name each input once")
    return _with_options(document, tensors, now)


def _takes_nothing(signature: Signature | None) -> bool:
    """Whether a request without inputs is a whole one: a model may compute from its weights, or from chance, alone."""
    return signature is not None and all(spec.optional for spec in signature.inputs)


def _load_object(head: Buffer) -> dict[str, Any]:
    try:
        document = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(_explain(head, error)) from None
    if type(document) is not dict:
        raise InvalidRequest(f"the JSON is {show(document)}; it must be an object, as in {_EXAMPLE}")
    return document


def _describe(item: Any) -> tuple[str, str, tuple[int, ...], int, dict[str, Any]]:
    if type(item) is not dict:
        raise InvalidRequest(f"an input is {show(item)}; each is an object with name, shape, datatype and data")
    name, datatype, dims = item.get("name"), item.get("datatype"), item.get("shape")
    if type(name) is not str or not name:
        raise InvalidRequest(f"an input's name is {show(name)}; each input has the name (a string) that the model's metadata lists")
    if not isinstance(datatype, str) or datatype not in _DATATYPES:
        raise InvalidRequest(f"input {show(name)}: datatype is {show(datatype)}; it is one of {', '.join(sorted(_DATATYPES))}")
    if type(dims) is not list or len(dims) > MAX_RANK:
        raise InvalidRequest(f"input {show(name)}: shape is {show(dims)}; it is a list of at most {MAX_RANK} integers, [] for a scalar")
    count = 1
    for dim in dims:
        if type(dim) is not int or not 0 <= dim < 2**63:
            raise InvalidRequest(
                f"input {show(name)}: shape {show(dims)} has {show(dim)} in it; every dimension is an integer of 63 bits, 0 or more"
            )
        count *= dim
    parameters = item.get("parameters")
    return name, datatype, tuple(dims), count, _NO_PARAMETERS if parameters is None else _object("parameters", parameters)


def _object(what: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise InvalidRequest(f"{what} is {show(value)}; it must be an object")
    return value


def _no_data(name: str, parameters: dict[str, Any]) -> Exception:
    if "shared_memory_region" in parameters:
        return Unsupported(f"input {show(name)}: this server takes no shared memory from clients; {BINARY_REMEDY}")
    return InvalidRequest(f"input {show(name)} has no data; add `data`, or {BINARY_REMEDY}")


def _slice(name: str, item: dict[str, Any], view: memoryview | None, at: int, length: Any, size: int) -> memoryview:
    if type(length) is not int or length < 0:
        raise InvalidRequest(f"input {show(name)}: binary_data_size is {show(length)}; it is the number of the tensor's bytes")
    if "data" in item:
        raise InvalidRequest(f"input {show(name)} has both data and binary_data_size; send one of them")
    if at + length > size:
        hint = "" if view is not None else "; is the header Inference-Header-Content-Length missing?"
        raise InvalidRequest(
            f"input {show(name)}: binary_data_size is {length}, but only {size - at} bytes of the body are left for it{hint}"
        )
    return memoryview(b"") if view is None else view[at : at + length]


def _with_options(document: dict[str, Any], tensors: list[Tensor], now: float) -> ParsedRequest:
    request = InferenceRequest(tensors, received_at=now)
    identity = document.get("id")
    if identity is not None:
        if type(identity) is not str:
            raise InvalidRequest(f"id is {show(identity)}; it is a string")
        request.request_id = identity
    binary_default = False
    parameters = document.get("parameters")
    if parameters:
        binary_default = _flag("binary_data_output", _object("parameters", parameters), False)
        priority, timeout = parameters.get("priority"), parameters.get("timeout")
        if priority is not None:
            request.priority = _natural("priority", priority, "0 (default), 1 (highest), 2, and so on")
        if timeout:
            request.deadline = now + _natural("timeout", timeout, "microseconds") / 1e6
    elif parameters is not None:
        _object("parameters", parameters)
    wanted = document.get("outputs")
    outputs = None
    if wanted:
        outputs = _outputs(wanted, binary_default)
        request.outputs = tuple([choice.name for choice in outputs])
    elif wanted is not None and wanted != []:
        raise InvalidRequest(f"outputs is {show(wanted)}; it is a list of objects with a name each, or left out for all outputs")
    return ParsedRequest(request, identity, outputs, binary_default)


def _natural(what: str, value: Any, rule: str) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise InvalidRequest(f"parameter {what} is {show(value)}; it is an integer of 64 bits: {rule}")
    return value


def _flag(what: str, parameters: dict[str, Any], default: bool) -> bool:
    value = parameters.get(what, default)
    if type(value) is not bool:
        raise InvalidRequest(f"parameter {what} is {show(value)}; it is true or false")
    return value


def _outputs(wanted: Any, binary_default: bool) -> tuple[OutputChoice, ...]:
    if type(wanted) is not list:
        raise InvalidRequest(f"outputs is {show(wanted)}; it is a list of objects with a name each, or left out for all outputs")
    choices: list[OutputChoice] = []
    for item in wanted:
        name = item.get("name") if type(item) is dict else None
        if type(name) is not str or not name:
            raise InvalidRequest(f"outputs has {show(item)} in it; each is an object with the name of an output")
        parameters = item.get("parameters")
        binary = binary_default
        if parameters is not None:
            binary = _flag("binary_data", _object("parameters", parameters), binary_default)
            if parameters.get("classification"):
                raise Unsupported(
                    f"output {show(name)}: no classification extension here; POST to the model's /predict for labels, or leave the parameter out"
                )
            if "shared_memory_region" in parameters:
                raise Unsupported(f"output {show(name)}: this server writes no shared memory of clients; leave the parameter out")
        if any(choice.name == name for choice in choices):
            raise InvalidRequest(f"output {show(name)} is asked for twice; name each output once")
        choices.append(OutputChoice(name, binary))
    return tuple(choices)


def _raw_request(body: Buffer, signature: Signature | None, now: float) -> ParsedRequest:
    needed = [spec for spec in signature.inputs if not spec.optional] if signature else []
    if len(needed) != 1:
        raise InvalidRequest(
            f"Inference-Header-Content-Length is 0 (a raw tensor), but the model has {len(needed)} inputs; this form takes a model with one. "
            "Send the JSON part first and its length in the header"
        )
    spec = needed[0]
    data: Buffer = body
    if spec.datatype == BYTES:
        shape, data = tuple(1 if dim == -1 else dim for dim in spec.shape), bytes_element(body)
        if any(dim != 1 for dim in shape):
            raise InvalidRequest(
                f"input {show(spec.name)}: a raw BYTES body is one element, but the model takes {list(spec.shape)}; use the JSON part"
            )
    else:
        shape = _raw_shape(spec, len(body))
    count = 1
    for dim in shape:
        count *= dim
    check_raw(spec.name, spec.datatype, shape, count, data)
    return ParsedRequest(InferenceRequest([Tensor(spec.name, spec.datatype, shape, data)], received_at=now), None, None, True)


def _raw_shape(spec: TensorSpec, size: int) -> tuple[int, ...]:
    """The shape of a raw body: its one free dimension follows from the size; a free first axis beside another is a batch of 1."""
    dims = list(spec.shape)
    if dims.count(-1) > 1 and dims[0] == -1:
        dims[0] = 1
    if dims.count(-1) > 1:
        raise InvalidRequest(
            f"input {show(spec.name)}: shape {list(spec.shape)} has several free dimensions, so a raw body's shape is unknown; use the JSON part"
        )
    if -1 in dims:
        known = DATATYPE_SIZES[spec.datatype]
        for dim in dims:
            known *= 1 if dim == -1 else dim
        if known == 0 or size % known:
            raise InvalidRequest(
                f"input {show(spec.name)}: {size} bytes are no whole number of {spec.datatype} elements for shape {list(spec.shape)}"
            )
        dims[dims.index(-1)] = size // known
    return tuple(dims)


def _may_hold_booleans(head: Buffer) -> bool:
    """Whether the text has `true` or `false`, so that elements need a look at their types; single letters first, they are found faster."""
    text = head if isinstance(head, bytes | bytearray) else bytes(head)
    return (b"r" in text and b"true" in text) or (b"l" in text and b"false" in text)


def _explain(head: Buffer, error: orjson.JSONDecodeError) -> str:
    if not bytes(head[:1024]).strip():
        return f"the body is empty; send a JSON object, as in {_EXAMPLE}"
    fault = _unwritable_number(head) if len(head) <= _EXPLAINED_BYTES else None
    return (
        fault
        or f"the body is not JSON: {error}. If it has binary tensors, set Inference-Header-Content-Length to the length of its JSON part"
    )


def _as_it_was_written(head: Buffer, error: InvalidRequest) -> InvalidRequest:
    """An integer past 64 bits comes from the fast parser as a float; quote it in full."""
    exact = _unwritable_number(head) if "e+" in str(error) and len(head) <= _EXPLAINED_BYTES else None
    return InvalidRequest(exact) if exact else error


def _unwritable_number(head: Buffer) -> str | None:
    """Names the tensor whose NaN, Infinity or endless number made the JSON invalid, by Python's laxer parser; errors only, small bodies only."""
    try:
        document = json.loads(bytes(head), parse_int=lambda digits: int(digits) if len(digits) < 1000 else float("inf"))
        inputs = [_describe(item) + (item.get("data"),) for item in document["inputs"]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, InvalidRequest):
        return None
    faults = (find_fault(name, datatype, data) for name, datatype, _, _, _, data in inputs if data is not None)
    return next((fault for fault in faults if fault), None)
