"""Inputs to calibrate with, train on or judge by. What calibrates never judges: `split` and `without` are disjoint by content hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

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
        return [hashlib.sha256(b"\0".join(np.ascontiguousarray(self.inputs[n][i]).tobytes() for n in names)).hexdigest() for i in range(len(self))]

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
        arrays: dict[str, NDArray[np.generic]] = {n: (v.astype(str) if v.dtype == object else v) for n, v in self.inputs.items()}
        if self.labels is not None:
            arrays["__labels__"] = self.labels
        np.savez_compressed(path, allow_pickle=False, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, origin: str = "owner", stacked: bool = True) -> Samples:
        """Read what `save` wrote, or any .npz whose keys are the model's input names (labels: `__labels__` or `labels`).

        Raises ValueError for unequal lengths or an empty file.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        labels = arrays.pop("__labels__", None)
        if labels is None and len(arrays) > 1:
            labels = arrays.pop("labels", None)
        lengths = {name: len(values) for name, values in arrays.items()}
        if not lengths or len({*lengths.values(), *([len(labels)] if labels is not None else [])}) != 1:
            raise ValueError(f"{path}: arrays must share one first axis (the samples), got {lengths}")
        return cls(arrays, None if labels is None else labels.astype(np.int64), origin, stacked)
