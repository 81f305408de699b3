"""Inputs made up from a signature, for models whose owner names no samples: the same seed gives the same values. Judges only what it can.

Made-up inputs show that two versions compute the same; they do not show how good either is, and lossy changes are not waved through on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.catalog.tensors import DTYPES
from app.domain import BYTES, Signature, TensorSpec
from optimizers.samples import Samples

SIDE: Final = 64
LENGTH: Final = 16
WORDS: Final = ("the", "cat", "sat", "on", "a", "mat", "naïve", "模型", "42", "")
_INTEGER_RANGES: Final = {"BOOL": (0, 2), "UINT8": (0, 256), "INT8": (-128, 128)}
_SMALL: Final = (0, 8)


def synthetic(
    signature: Signature,
    count: int,
    seed: int = 0,
    row_shapes: Mapping[str, Sequence[int]] | None = None,
    integers: Sequence[int] | None = None,
) -> Samples:
    """`count` rows (or whole calls, where rows are not independent): floats are normal, integers small, masks ones, segments zeros.

    `row_shapes` are shapes that the model is known to take, batch axis included (the inspector's); others are guessed.
    `integers` is the range [low, high) of whole numbers that it takes, where that was found too.
    """
    rng = np.random.default_rng(seed)
    taken = (int(integers[0]), int(integers[1])) if integers else _SMALL
    known = {name: tuple(shape) for name, shape in (row_shapes or {}).items()}
    inputs = {
        spec.name: _values(spec, (count, *_shape(spec, signature.batchable, known.get(spec.name))), rng, taken)
        for spec in signature.inputs
        if not spec.optional
    }
    return Samples(inputs, None, "synthetic", signature.batchable)


def _values(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, integers: tuple[int, int]) -> NDArray[Any]:
    if spec.datatype == BYTES:
        return np.array([WORDS[i] for i in rng.integers(0, len(WORDS), np.prod(shape))], dtype=object).reshape(shape)
    if spec.datatype in {"FP16", "BF16", "FP32", "FP64"}:
        return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES.get(spec.datatype, "<f4"))
    return _integers(spec, rng, integers)(shape).astype(DTYPES[spec.datatype])


def _integers(spec: TensorSpec, rng: np.random.Generator, taken: tuple[int, int]) -> Callable[[tuple[int, ...]], NDArray[Any]]:
    name = spec.name.lower()
    if "mask" in name:
        return lambda shape: np.ones(shape, np.int64)
    if "type" in name or "segment" in name:
        return lambda shape: np.zeros(shape, np.int64)
    low, high = _INTEGER_RANGES.get(spec.datatype, _SMALL) if taken == _SMALL or spec.datatype == "BOOL" else taken
    return lambda shape: rng.integers(low, high, shape)


def _shape(spec: TensorSpec, batchable: bool, known: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one row or call, with free dimensions filled in: as known, else image sides for rank four, one length for the others."""
    if known is not None and len(known) == len(spec.shape):
        return known[1:] if batchable else known
    free = SIDE if len(spec.shape) == 4 else LENGTH
    fixed = [free if size < 0 else size for size in spec.shape]
    if len(spec.shape) == 4 and not batchable and spec.shape[0] < 0:
        fixed[0] = 1
    return tuple(fixed[1:] if batchable else fixed)
