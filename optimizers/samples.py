"""Inputs to calibrate with, train on or judge by. What calibrates never judges: `split` and `without` are disjoint by content hash."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optimizers.host import memory_budget

TEXT_BYTES: Final = 64
"""What a str object takes beside its characters, at most."""


@dataclass(frozen=True)
class Samples:
    """`inputs[name]` has shape [n, ...]: one row per sample, with the model's dtypes. `labels` (int64 [n]) where they exist.

    For models without a batch axis a row *is* the whole input (`stacked` is False then, and every row is one call).
    `origin` says where they came from: owner | captured | synthetic.
    """

    inputs: dict[str, NDArray[np.generic]]
    labels: NDArray[np.int64] | None = None
    origin: str = "owner"
    stacked: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if self.inputs else 0

    def rows(self, index: NDArray[np.intp] | slice | list[int]) -> Samples:
        labels = None if self.labels is None else self.labels[index]
        return Samples({name: values[index] for name, values in self.inputs.items()}, labels, self.origin, self.stacked)

    def hashes(self) -> list[str]:
        """One hash per row, over all inputs in name order."""
        names = sorted(self.inputs)
        return [hashlib.sha256(b"\0".join(_row_bytes(self.inputs[n][i]) for n in names)).hexdigest() for i in range(len(self))]

    def without(self, hashes: set[str]) -> Samples:
        """The rows whose hash is not among `hashes`."""
        return self.rows([i for i, h in enumerate(self.hashes()) if h not in hashes])

    def split(self, share: float, seed: int = 0) -> tuple[Samples, Samples]:
        """Two disjoint parts (`share`, rest); equal rows always fall on the same side."""
        first: list[int] = []
        second: list[int] = []
        for i, digest in enumerate(self.hashes()):
            draw = int(hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
            (first if draw < share else second).append(i)
        return self.rows(first), self.rows(second)

    def save(self, path: Path) -> None:
        """Write an .npz (no pickles): inputs by name, labels under `__labels__`, string tensors as unicode arrays."""
        arrays: dict[str, NDArray[np.generic]] = dict(self.inputs)
        if self.labels is not None:
            arrays["__labels__"] = self.labels
        write_npz(path, arrays)

    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's inputs for one row; for one call, where samples are such."""
        return {name: (1, *values.shape[1:]) if self.stacked else values.shape[1:] for name, values in self.inputs.items()}

    @classmethod
    def load(cls, path: Path, origin: str = "owner", stacked: bool = True, most: int | None = None) -> Samples:
        """Read what `save` wrote, or any .npz whose keys are the model's input names (labels: `__labels__` or `labels`); the first `most` rows, if given.

        Raises ValueError for unequal lengths or an empty file.
        """
        arrays = read_npz(path, most)
        labels = arrays.pop("__labels__", None)
        if labels is None and len(arrays) > 1:
            labels = arrays.pop("labels", None)
        if single := [name for name, values in arrays.items() if not values.ndim]:
            raise ValueError(f"{single[0]!r} is a single value; its first axis must be the samples")
        if labels is not None and not (labels.dtype.kind in "iufb" and labels.ndim and _are_whole(labels)):
            raise ValueError("labels must be one number of a class for each sample")
        lengths = {name: len(values) for name, values in arrays.items()}
        if not lengths or len({*lengths.values(), *([len(labels)] if labels is not None else [])}) != 1:
            raise ValueError(f"{path}: arrays must share one first axis (the samples), got {lengths}")
        return cls(arrays, None if labels is None else labels.astype(np.int64), origin, stacked)


def _are_whole(values: NDArray[Any]) -> bool:
    with np.errstate(invalid="ignore"):
        return np.array_equal(values.astype(np.int64), values)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Arrays as a compressed .npz without pickles, whatever their names (numpy's own function takes them as keywords); text as unicode arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, values in arrays.items():
            plain = values.astype(str) if values.dtype == object else values
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(plain), allow_pickle=False)


def read_npz(path: Path, most: int | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; text as arrays of str objects, as ONNX Runtime wants it. Of each array the first `most` entries, if given: no more of it
    is held in memory. Raises ValueError for pickles, for what is cut or damaged, and for what would fill the memory that there is: a few megabytes
    of zeros unpack to many gigabytes."""
    path.stat()  # a file that is not there is another matter
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz, as numpy.savez writes it, or it was copied in part")
    try:
        with zipfile.ZipFile(path) as archive:
            heads = {member.filename: _head(archive, member) for member in archive.infolist()}
            _check_room(sum(head.bytes(most) for head in heads.values()))
            arrays = {name.removesuffix(".npy"): _array(archive, name, head, most) for name, head in heads.items()}
            return {name: values.astype(object) if values.dtype.kind == "U" else values for name, values in arrays.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, SystemError, RuntimeError, TypeError) as error:  # SystemError: text that is none
        raise ValueError(f"it is damaged: {error}") from None


@dataclass(frozen=True)
class _Head:
    """What an array in an .npz says of itself."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]

    def bytes(self, most: int | None) -> int:
        entries = math.prod(self.shape if most is None else (min(most, *self.shape[:1]), *self.shape[1:]))
        return entries * (self.dtype.itemsize + (TEXT_BYTES if self.dtype.kind == "U" else 0))


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Head:
    """Raises ValueError for pickles, and where the array's head and the file's size contradict each other."""
    name = member.filename
    if not name.endswith(".npy") or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name.removesuffix('.npy')!r} in it is no array")
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            head = _Head(*read(file))
        except (TypeError, TokenError, SyntaxError, MemoryError, RecursionError) as error:  # numpy reads heads by Python's parser
            raise ValueError(f"{name} begins with nonsense ({type(error).__name__})") from None
        if head.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects (a pickle), which are not loaded")
        promised = math.prod(head.shape) * head.dtype.itemsize
        if not head.dtype.itemsize or min(head.shape, default=0) < 0 or file.tell() + promised != member.file_size:
            raise ValueError(
                f"{name} should have {promised} bytes, by its shape {list(head.shape)}, and has {member.file_size - file.tell()}"
            )
    return head


def _check_room(needed: int) -> None:
    room = memory_budget().available_bytes // 2
    if needed > room:
        raise ValueError(f"it unpacks to {needed} bytes, more than half of the memory that is free ({room} bytes); name fewer samples")


def _array(archive: zipfile.ZipFile, name: str, head: _Head, most: int | None) -> NDArray[Any]:
    """The array, or its first `most` entries where it is laid out as `write_npz` writes it."""
    with archive.open(name) as member:
        if most is None:
            return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
        if (head.by_columns and len(head.shape) > 1) or not head.shape:
            raise ValueError(f"{name} is not laid out row by row")
        member.read(archive.getinfo(name).file_size - math.prod(head.shape) * head.dtype.itemsize)
        rows = min(most, head.shape[0])
        data = member.read(rows * math.prod(head.shape[1:]) * head.dtype.itemsize)
    return np.frombuffer(bytearray(data), head.dtype).reshape(rows, *head.shape[1:])


def _row_bytes(row: Any) -> bytes:
    """The content of one row; text by its characters, so that equal texts are equal in arrays of any width."""
    values = np.asarray(row)
    if values.dtype.kind in "OU":
        return b"".join(
            len(raw).to_bytes(4, "little") + raw for raw in (str(text).encode("utf-8", "surrogatepass") for text in values.ravel())
        )
    return np.ascontiguousarray(values).tobytes()
