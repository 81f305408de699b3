"""Wire tensors as numpy arrays and back, inside a runner: views on the arena going in, buffers for the arena coming out.

It knows neither ONNX Runtime nor torch; BF16, which numpy lacks, travels as uint16.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from app.domain import BYTES, Buffer
from app.errors import InvalidRequest
from app.serving.shm import padding, size_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_), "UINT8": np.dtype("<u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"), "INT8": np.dtype("<i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"), "FP16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
DATATYPES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}


def view(memory: memoryview, datatype: str, shape: Sequence[int], offset: int) -> Array:
    """A fixed-size tensor in the arena, without a copy."""
    count = math.prod(shape)
    if not count:
        return np.empty(shape, DTYPES[datatype])
    array: Array = np.frombuffer(memory, DTYPES[datatype], count, offset)
    return array.reshape(shape)


def strings(data: Buffer, name: str, shape: Sequence[int]) -> Array:
    """A BYTES tensor (uint32 length and bytes, again and again) as an object array of str: ONNX strings are UTF-8.

    Raises InvalidRequest naming tensor and element where bytes are not UTF-8 or lengths do not add up.
    """
    count = math.prod(shape)
    items: list[str] = []
    position, end = 0, size_of(data)
    for index in range(count):
        if position + 4 > end:
            raise InvalidRequest(f"input {name!r}: element {index} of {count} is missing; {end} bytes hold no more")
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        if position + length > end:
            raise InvalidRequest(f"input {name!r}: element {index} says {length} bytes, only {end - position} are left")
        try:
            items.append(str(data[position : position + length], "utf-8"))
        except UnicodeDecodeError as error:
            what = f"input {name!r}: element {index} is not UTF-8 ({error.reason} at byte {error.start})"
            raise InvalidRequest(f"{what}; texts of a model are UTF-8, so encode this one before sending") from None
        position += length
    if position != end:
        raise InvalidRequest(f"input {name!r}: {end - position} bytes follow its last element")
    array = np.empty(count, object)
    array[:] = items
    return array.reshape(shape)


def string_buffers(array: Array) -> list[bytes]:
    """Each element of an object array in wire form."""
    encoded = [item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()]
    return [struct.pack("<I", len(item)) + item for item in encoded]


Described: TypeAlias = tuple[str, str, list[int], int, int, list[int] | None]
"""name, datatype, shape, offset from the first output, bytes, and for BYTES of a shared batch the bytes of each request's part."""


def describe(named: Sequence[tuple[str, str, Array]], rows: Sequence[int] | None) -> tuple[list[Described], list[Buffer], int]:
    """Lay outputs out one after another: their description, the buffers to write, and the bytes they take together."""
    described: list[Described] = []
    buffers: list[Buffer] = []
    position = 0
    for name, datatype, array in named:
        parts = None
        if datatype == BYTES:
            items = string_buffers(array)
            if rows is not None and array.ndim:
                parts = _parts(items, array, rows)
            data: Buffer = b"".join(items)
            size = len(data)
        else:
            size = array.nbytes
            data = array.data if array.flags.c_contiguous else array.tobytes()
        described.append((name, datatype, list(array.shape), position, size, parts))
        if size:
            buffers.append(data)
            buffers.append(padding(size))
        position += size + (-size % 64)
    return described, buffers, position


def _parts(items: list[bytes], array: Array, rows: Sequence[int]) -> list[int]:
    per_row = math.prod(array.shape[1:])
    sizes: list[int] = []
    start = 0
    for count in rows:
        stop = start + count * per_row
        sizes.append(sum(map(len, items[start:stop])))
        start = stop
    return sizes
