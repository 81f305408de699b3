"""Signatures, samples and calls for the tests of references and reservoirs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from app.catalog.model_config import Capture
from app.catalog.reservoir import Reservoir
from app.catalog.tensors import to_tensor
from app.domain import Signature, Tensor, TensorSpec

ROWS = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 3)),), True)


def call(value: float, rows: int = 1, top: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """A request whose rows are value, value + 1, …, and its answer, which is class `top`."""
    x = np.repeat(np.arange(rows, dtype="f4")[:, None] + np.float32(value), 4, axis=1)
    y = np.zeros((rows, 3), "f4")
    y[:, top] = 1
    return [to_tensor("x", "FP32", x)], [to_tensor("y", "FP32", y)]


def opened(folder: Path, capture: Capture | None = None, signature: Signature = ROWS, golden: str = "g") -> Reservoir:
    reservoir = Reservoir(folder)
    reservoir.configure(capture or Capture(), signature, True, golden)
    return reservoir


def take(reservoir: Reservoir, inputs: list[Tensor], outputs: list[Tensor], caller: str = "c") -> None:
    """Offer until it is taken, and store it."""
    end = time.monotonic() + 30
    while not reservoir.offer(inputs, outputs, caller):
        assert time.monotonic() < end
        time.sleep(0.002)
    reservoir.store_pending()
