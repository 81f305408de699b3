"""One captured input as a file: a line of JSON that tells what it is, then the raw tensors as they came over the wire."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.catalog.durable import TEMPORARY
from app.catalog.tensors import DTYPES, elements, to_array
from app.domain import BYTES, DATATYPE_SIZES, Signature, Tensor
from optimizers.samples import Samples

SUFFIX: Final = ".sample"
MAX_HEAD_BYTES: Final = 1 << 16
MOST_TEXTS: Final = 4096
"""Of a call with more, no row is looked for: texts are passed one by one, on the event loop."""


@dataclass(frozen=True, slots=True)
class Captured:
    """`group` is the predicted class or empty; `row`: the inputs are one row without its batch axis, else a whole call."""

    at: float
    group: str
    caller: str
    row: bool
    inputs: tuple[Tensor, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for samples that may be stacked."""
        return (self.row, *sorted((tensor.name, tensor.datatype, tensor.shape) for tensor in self.inputs))

    @staticmethod
    def together(samples: Sequence[Captured]) -> Samples:
        """Samples of one form as arrays; BF16 as float32, BYTES as text."""
        names = [tensor.name for tensor in samples[0].inputs]
        arrays = {name: np.stack([_values(_named(sample, name)) for sample in samples]) for name in names}
        return Samples(arrays, None, "captured", samples[0].row)


def one_row(inputs: Sequence[Tensor], outputs: Sequence[Tensor], signature: Signature) -> tuple[list[Tensor], list[Tensor]] | None:
    """A row at random of a batchable call, without its batch axis, with its outputs; else the whole call. Copies the bytes.

    None for a call that cannot be cut: rows of different number, or text of variable size that does not add up or is of too many elements.
    """
    if not signature.batchable:
        return [_copy(tensor) for tensor in inputs], [_copy(tensor) for tensor in outputs]
    counts = {tensor.shape[0] if tensor.shape else 0 for tensor in (*inputs, *outputs)}
    if len(counts) != 1 or (rows := counts.pop()) < 1:
        return None
    chosen = random.randrange(rows)
    if any(tensor.datatype == BYTES and prod(tensor.shape) > MOST_TEXTS for tensor in (*inputs, *outputs)):
        return None
    return [_row(tensor, chosen) for tensor in inputs], [_row(tensor, chosen) for tensor in outputs]


def predicted_class(outputs: Sequence[Tensor]) -> str:
    """Where the first floating-point output is largest, by its last axis; empty where there is none."""
    scores = next((tensor for tensor in outputs if tensor.datatype in {"FP16", "BF16", "FP32", "FP64"} and len(tensor.data)), None)
    if scores is None or prod(scores.shape) < 2:
        return ""
    values = to_array(scores).ravel()
    return str(int(np.nanargmax(values))) if not np.isnan(values).all() else ""


def write(folder: Path, sample: Captured) -> tuple[Path, int]:
    """Store `sample` readable for its owner only; returns the file and its size. A kill leaves a whole file or a temporary one."""
    head = {
        "at": sample.at, "group": sample.group, "caller": sample.caller, "row": sample.row,
        "inputs": [{"name": t.name, "datatype": t.datatype, "shape": t.shape, "bytes": len(t.data)} for t in sample.inputs],
    }  # fmt: skip
    token = secrets.token_hex(4)
    temporary = folder / f"{TEMPORARY}{token}"
    path = folder / f"{int(sample.at * 1000):014d}-{token}{SUFFIX}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for tensor in sample.inputs:
                file.write(tensor.data)
            size = file.tell()
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path, size


def head_of(path: Path) -> Captured | None:
    """What the file tells of itself, without the data; None for a file that is damaged."""
    try:
        with path.open("rb") as file:
            return _parse(file.readline(MAX_HEAD_BYTES), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(path: Path) -> Captured | None:
    """The whole sample; None for a file that is damaged or gone."""
    try:
        with path.open("rb") as file:
            return _parse(file.readline(MAX_HEAD_BYTES), file.read())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parse(line: bytes, data: bytes | None) -> Captured:
    head: dict[str, Any] = json.loads(line)
    inputs, at = [], 0
    for tensor in head["inputs"] if data is not None else ():
        part = data[at : at + tensor["bytes"]] if data is not None else b""
        at += tensor["bytes"]
        inputs.append(Tensor(tensor["name"], tensor["datatype"], tuple(tensor["shape"]), part))
    if data is not None and at != len(data):
        raise ValueError(f"{at} bytes are announced, {len(data)} are there")
    return Captured(float(head["at"]), head["group"], head["caller"], head["row"], tuple(inputs))


def _row(tensor: Tensor, index: int) -> Tensor:
    shape = tensor.shape[1:]
    if tensor.datatype == BYTES:
        per_row, view = prod(shape), memoryview(tensor.data)
        start = _behind(view, 0, index * per_row)
        return Tensor(tensor.name, BYTES, shape, bytes(view[start : _behind(view, start, per_row)]))
    size = prod(shape) * DATATYPE_SIZES[tensor.datatype]
    return Tensor(tensor.name, tensor.datatype, shape, bytes(memoryview(tensor.data)[index * size : (index + 1) * size]))


def _behind(view: memoryview, at: int, count: int) -> int:
    """Where the texts after the next `count` begin."""
    for _ in range(count):
        at += 4 + int.from_bytes(view[at : at + 4], "little")
    return at


def _copy(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))


def _named(sample: Captured, name: str) -> Tensor:
    return next(tensor for tensor in sample.inputs if tensor.name == name)


def _values(tensor: Tensor) -> NDArray[Any]:
    if tensor.datatype == BYTES:
        texts = [item.decode("utf-8", "replace") for item in elements(tensor)]
        return np.array(texts, dtype=object).reshape(tensor.shape)
    values = to_array(tensor)
    return values if tensor.datatype == "BF16" else values.astype(DTYPES[tensor.datatype], copy=False)
