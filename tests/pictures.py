"""A model that takes images, and what makes tensors of them for it."""

from __future__ import annotations

from typing import Any

from app.catalog.processing import Preprocess, Processor
from app.domain import Signature, TensorSpec


def image_signature(shape: tuple[int, ...] = (-1, 3, 4, 6), datatype: str = "FP32") -> Signature:
    return Signature((TensorSpec("x", datatype, shape),), (TensorSpec("scores", "FP32", (-1, 3)),), batchable=True)


def image_processor(shape: tuple[int, ...] = (-1, 3, 4, 6), datatype: str = "FP32", **section: Any) -> Processor:
    return Processor(image_signature(shape, datatype), Preprocess.model_validate({"image": section}))
