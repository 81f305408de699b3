"""Wire tensors to numpy arrays and back, for code off the hot path. Knows nothing of models or requests."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.domain import BYTES, Tensor

Array = NDArray[Any]

DTYPES: Final[dict[str, str]] = {
    "BOOL": "|b1", "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "|i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})


def to_tensor(name: str, datatype: str, array: Array) -> Tensor:
    """`array` as a wire tensor of `datatype` (texts for BYTES); the caller has checked that the values fit."""
    if datatype == BYTES:
        return bytes_tensor(name, array.shape, (str(text).encode("utf-8", "surrogateescape") for text in array.ravel()))
    if datatype == "BF16":
        return Tensor(name, datatype, array.shape, _bf16_bits(array).tobytes())
    return Tensor(name, datatype, array.shape, np.ascontiguousarray(array, dtype=DTYPES[datatype]).tobytes())


def to_array(tensor: Tensor) -> Array:
    """The tensor's values; BF16 comes as float32, BYTES as texts (for other bytes see `elements`)."""
    if tensor.datatype == BYTES:
        texts = np.empty(len(items := elements(tensor)), object)
        texts[:] = [item.decode("utf-8", "surrogateescape") for item in items]
        return texts.reshape(tensor.shape)
    if tensor.datatype == "BF16":
        bits = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    array = np.frombuffer(tensor.data, dtype=DTYPES[tensor.datatype]).reshape(tensor.shape)
    return array if array.flags.aligned else array.copy()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no float among them is NaN or infinite."""
    return all(bool(np.isfinite(to_array(tensor)).all()) for tensor in tensors if tensor.datatype in FLOATS)


def bytes_tensor(name: str, shape: tuple[int, ...], items: Iterable[bytes]) -> Tensor:
    return Tensor(name, BYTES, shape, b"".join(struct.pack("<I", len(item)) + item for item in items))


def elements(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor, in order."""
    data, at, items = memoryview(tensor.data), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        items.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return items


def _bf16_bits(array: Array) -> Array:
    """Upper halves of float32, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype="<f4").view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype("<u2")
