"""Inputs to calibrate with, train on or judge by. What calibrates never judges: `split` and `without` are disjoint by content hash."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
        if labels is not None and (labels.dtype.kind not in "iufb" or not labels.ndim):
            raise ValueError("labels must be one number of a class for each sample")
        lengths = {name: len(values) for name, values in arrays.items()}
        if not lengths or len({*lengths.values(), *([len(labels)] if labels is not None else [])}) != 1:
            raise ValueError(f"{path}: arrays must share one first axis (the samples), got {lengths}")
        return cls(arrays, None if labels is None else labels.astype(np.int64), origin, stacked)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Arrays as a compressed .npz without pickles, whatever their names (numpy's own function takes them as keywords); text as unicode arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, values in arrays.items():
            plain = values.astype(str) if values.dtype == object else values
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(plain), allow_pickle=False)


def read_npz(path: Path, most: int | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; text as arrays of str objects, as ONNX Runtime wants it. Of each array the first `most` entries, if given: no more of it
    is held in memory. Raises ValueError for pickles, and for what is cut or damaged."""
    path.stat()  # a file that is not there is another matter
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz, as numpy.savez writes it, or it was copied in part")
    try:
        if most is None:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        else:
            with zipfile.ZipFile(path) as archive:
                arrays = {name.removesuffix(".npy"): _first(archive, name, most) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"it is damaged: {error}") from None
    if stray := [name for name, values in arrays.items() if not isinstance(values, np.ndarray)]:
        raise ValueError(f"{stray[0]!r} in it is no array")
    return {name: values.astype(object) if values.dtype.kind == "U" else values for name, values in arrays.items()}


def _first(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """The first `most` entries of an array, as `write_npz` writes it. Raises ValueError for pickles."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(member)
        if dtype.hasobject or (by_columns and len(shape) > 1) or not shape:
            raise ValueError(f"{name} is not laid out row by row")
        rows = min(most, shape[0])
        data = member.read(rows * int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    return np.frombuffer(bytearray(data), dtype).reshape(rows, *shape[1:])


def _row_bytes(row: Any) -> bytes:
    """The content of one row; text by its characters, so that equal texts are equal in arrays of any width."""
    values = np.asarray(row)
    if values.dtype.kind in "OU":
        return b"".join(
            len(raw).to_bytes(4, "little") + raw for raw in (str(text).encode("utf-8", "surrogatepass") for text in values.ravel())
        )
    return np.ascontiguousarray(values).tobytes()
