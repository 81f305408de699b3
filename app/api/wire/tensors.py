"""Tensor data in its two forms: JSON lists and raw bytes. Knows elements and shapes; knows nothing of requests or models.

JSON is taken strictly, for a number that is narrowed in silence is a right answer to another question:
integers are integers in range (no 1.0, no "7", no true), floats are finite numbers that fit the datatype, BOOL is true, false, 0 or 1,
BYTES are strings (their UTF-8). Not-a-number and infinity have no JSON form: they travel in the binary form, both ways;
a JSON reply shows them as null and counts them in the output's parameter `non_finite`.
"""

from __future__ import annotations

import math
import reprlib
import struct
from itertools import chain
from typing import Any, Final

import numpy as np

from app.domain import BYTES, DATATYPE_SIZES, Buffer, Tensor
from app.errors import InvalidRequest

BINARY_REMEDY: Final = (
    "send it as binary: leave out `data`, set the parameter `binary_data_size` and the header Inference-Header-Content-Length"
)
ONLY_BINARY: Final = frozenset({"FP16", "BF16"})
_INTEGERS: Final = {"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"}
_FLOATS: Final = {"FP32": "<f", "FP64": "<d"}  # "<", for the native form turns 1e39 into infinity in silence
_ARRAYS: Final = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8",
    "FP16": "f2", "FP32": "f4", "FP64": "f8",
}  # fmt: skip
_LARGEST_FP32: Final = 3.4028234663852886e38
_LENGTH: Final = struct.Struct("<I")
_QUOTE: Final = reprlib.Repr()
_QUOTE.maxlevel, _QUOTE.maxlist, _QUOTE.maxstring, _QUOTE.maxlong, _QUOTE.maxdict = 3, 12, 60, 40, 4


def show(value: object) -> str:
    """A value as an error text quotes it: never longer than a line, whatever its size."""
    if value is None or value is True or value is False:
        return "null" if value is None else str(value).lower()
    text = _QUOTE.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def pack_json(name: str, datatype: str, shape: tuple[int, ...], count: int, data: Any, may_hold_booleans: bool = True) -> bytes:
    """The raw form of a tensor's JSON `data`, nested as `shape` says or flat. `may_hold_booleans`: the JSON text has true or false in it.

    struct packs a list three times faster than numpy converts it, and checks type and range of each element on its way.
    """
    items = _flatten(name, shape, count, data)
    if datatype in _FLOATS or datatype in _INTEGERS:
        form = f"<{count}{_FLOATS[datatype][1]}" if datatype in _FLOATS else f"{count}{_INTEGERS[datatype]}"
        if may_hold_booleans and bool in set(map(type, items)):
            raise InvalidRequest(_fault(name, datatype, items))
        try:
            return struct.pack(form, *items)
        except (struct.error, OverflowError, TypeError):
            raise InvalidRequest(_fault(name, datatype, items)) from None
    if datatype == BYTES:
        return _pack_strings(name, items)
    if datatype == "BOOL":
        if not set(map(type, items)) <= {bool, int} or not set(items) <= {0, 1}:
            raise InvalidRequest(_fault(name, datatype, items))
        return bytes(items)
    raise InvalidRequest(_no_json_input(name, datatype))


def unpack_json(tensor: Tensor) -> tuple[list[str] | np.ndarray[Any, Any], int]:
    """`data` for a JSON reply, flat, and how many of its elements are not finite (orjson writes those as null)."""
    if tensor.datatype == BYTES:
        return _unpack_strings(tensor), 0
    if tensor.datatype in ONLY_BINARY:
        raise InvalidRequest(no_json_output(tensor.name, tensor.datatype))
    array = np.frombuffer(tensor.data, _ARRAYS[tensor.datatype])
    if not array.flags.aligned:
        array = array.copy()
    return array, _non_finite(array) if tensor.datatype in _FLOATS else 0


def count_non_finite(tensor: Tensor) -> int:
    """How many elements of a float tensor are NaN or infinite; 0 for other datatypes."""
    if tensor.datatype == "BF16":
        return int(np.count_nonzero((np.frombuffer(tensor.data, "u2") & 0x7F80) == 0x7F80))
    if tensor.datatype in _FLOATS or tensor.datatype == "FP16":
        return _non_finite(np.frombuffer(tensor.data, _ARRAYS[tensor.datatype]))
    return 0


def check_raw(name: str, datatype: str, shape: tuple[int, ...], count: int, data: Buffer) -> None:
    """Raise InvalidRequest unless `data` is a tensor of this datatype and shape in its raw form."""
    if datatype == BYTES:
        _check_elements(name, shape, count, data)
        return
    expected = count * DATATYPE_SIZES[datatype]
    if len(data) != expected:
        raise InvalidRequest(
            f"input {show(name)}: {datatype} of shape {show(list(shape))} takes {expected} bytes, but binary_data_size is {len(data)}; make shape and size agree"
        )
    if datatype == "BOOL" and count and int(np.frombuffer(data, "u1").max()) > 1:
        index = int(np.argmax(np.frombuffer(data, "u1") > 1))
        raise InvalidRequest(f"input {show(name)}: element {index} is the byte {data[index]}; a BOOL is the byte 0 or 1")


def bytes_element(data: Buffer) -> bytes:
    """One BYTES element: its length, then itself."""
    return _LENGTH.pack(len(data)) + data


def _no_json_input(name: str, datatype: str) -> str:
    return f"input {show(name)}: {datatype} has no JSON form; {BINARY_REMEDY}"


def no_json_output(name: str, datatype: str) -> str:
    return (
        f"output {show(name)}: {datatype} has no JSON form; ask for it as binary: the output's parameter `binary_data`: true, "
        "or the request's parameter `binary_data_output`: true"
    )


def _flatten(name: str, shape: tuple[int, ...], count: int, data: Any) -> list[Any]:
    if type(data) is not list:
        if not shape and type(data) is not dict:
            return [data]
        raise InvalidRequest(
            f"input {show(name)}: data is {show(data)}; `data` is a list, nested as shape {show(list(shape))} says or flat"
        )
    if not data or type(data[0]) is not list:
        if len(data) != count:
            raise InvalidRequest(
                f"input {show(name)}: shape {show(list(shape))} has {count} elements, but data has {len(data)}; make them agree"
            )
        return data
    level = data
    for depth, size in enumerate(shape):
        parts = level if depth else [level]
        wrong = [part for part in parts if type(part) is not list or len(part) != size][:1]
        if wrong:
            part = wrong[0]
            found = f"{len(part)} of them" if type(part) is list else show(part)
            raise InvalidRequest(
                f"input {show(name)}: shape {show(list(shape))} wants lists of {size} along axis {depth}, but data has {found} there; "
                "nest data as the shape says, or send it flat"
            )
        if depth:
            level = list(chain.from_iterable(level))
    return level


def _fault(name: str, datatype: str, items: list[Any]) -> str:
    """What is wrong with the first element that is not of this datatype."""
    for index, item in enumerate(items):
        reason = _reason(datatype, item)
        if reason:
            return f"input {show(name)}: element {index} is {show(item)}; {reason}"
    return f"input {show(name)}: data is not of datatype {datatype}"


def find_fault(name: str, datatype: str, data: Any) -> str | None:
    """The first wrong element of flat or nested data that could not be packed at all, for an error text; None where none is found."""
    if datatype in ONLY_BINARY:
        return _no_json_input(name, datatype)
    items = data if type(data) is list else [data]
    while items and type(items[0]) is list:
        items = list(chain.from_iterable(part for part in items if type(part) is list))
    return _fault(name, datatype, items) if any(_reason(datatype, item) for item in items) else None


def _reason(datatype: str, item: Any) -> str:
    if datatype in _INTEGERS:
        return _integer_reason(datatype, item)
    if datatype in _FLOATS:
        return _float_reason(datatype, item)
    if datatype == "BOOL":
        return "" if type(item) in (bool, int) and item in (0, 1) else "BOOL takes true, false, 1 or 0"
    return "" if type(item) is str else "BYTES takes strings; bytes that are not text travel as binary"


def _integer_reason(datatype: str, item: Any) -> str:
    bits = 8 * DATATYPE_SIZES[datatype]
    low, high = (0, 2**bits - 1) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rule = f"{datatype} takes integers from {low} to {high}"
    if type(item) is int:
        return "" if low <= item <= high else rule
    if type(item) is float and item.is_integer() and low <= item <= high:
        return f"{rule}, written without a fraction or exponent"
    return rule


def _float_reason(datatype: str, item: Any) -> str:
    if type(item) not in (int, float):
        return f"{datatype} takes numbers"
    largest = _LARGEST_FP32 if datatype == "FP32" else 1.7976931348623157e308
    if type(item) is float and not math.isfinite(item):
        return f"{datatype} in JSON takes finite numbers from -{largest} to {largest}; for NaN and infinity {BINARY_REMEDY}"
    try:
        struct.pack(_FLOATS[datatype], item)
    except (OverflowError, struct.error):
        return f"{datatype} takes numbers from -{largest} to {largest}"
    return ""


def _pack_strings(name: str, items: list[Any]) -> bytes:
    parts = []
    try:
        for item in items:
            encoded = item.encode()
            parts.append(_LENGTH.pack(len(encoded)))
            parts.append(encoded)
    except AttributeError:
        raise InvalidRequest(_fault(name, BYTES, items)) from None
    return b"".join(parts)


def _unpack_strings(tensor: Tensor) -> list[str]:
    data, texts, at = bytes(tensor.data), [], 0
    while at < len(data):
        end = at + 4 + _LENGTH.unpack_from(data, at)[0]
        try:
            texts.append(data[at + 4 : end].decode())
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output {show(tensor.name)}: element {len(texts)} is not UTF-8, so JSON cannot carry it; "
                "ask for it as binary: the output's parameter `binary_data`: true"
            ) from None
        at = end
    return texts


def _check_elements(name: str, shape: tuple[int, ...], count: int, data: Buffer) -> None:
    at, size, found = 0, len(data), 0
    read = _LENGTH.unpack_from
    while at < size:
        end = at + 4 + read(data, at)[0] if at + 4 <= size else size + 1
        if end > size:
            raise InvalidRequest(
                f"input {show(name)}: element {found} of BYTES ends {end - size} bytes past its {size} bytes; each element is a uint32 length "
                "(little-endian) and that many bytes"
            )
        at, found = end, found + 1
    if found != count:
        raise InvalidRequest(
            f"input {show(name)}: shape {show(list(shape))} has {count} elements, but {found} are in its {size} bytes; make them agree"
        )


def _non_finite(array: np.ndarray[Any, Any]) -> int:
    if array.size <= 64 and all(map(math.isfinite, array.tolist())):  # a list of a few floats is done before numpy has begun
        return 0
    return int(array.size - np.count_nonzero(np.isfinite(array)))
