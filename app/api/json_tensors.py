"""Tensors in plain JSON, as people write them: nested lists, with shape and datatype taken from the model. Strict about every element.

The friendly form beside the protocol's (app.api.wire), whose element checks it uses. Knows Signature, nothing of images or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from app.api.wire.tensors import pack_json, show
from app.catalog.tensors import to_tensor
from app.domain import Signature, Tensor, TensorSpec
from app.errors import InvalidRequest

WRAPPERS: Final = ("data", "inputs", "instances")
MAX_DEPTH: Final = 64
_HALF: Final = {"FP16": 65504.0, "BF16": 3.3895313892515355e38}


def tensors_of(document: Any, signature: Signature) -> tuple[list[Tensor], bool]:
    """A bare nested list, {"data": list}, or {input name: list, ...} -> tensors, and whether it was one row without its batch axis.

    Raises InvalidRequest naming input, element, value and rule.
    """
    given = _by_input(document, signature)
    specs = {spec.name: spec for spec in signature.inputs}
    tensors, singles = [], []
    for name, data in given.items():
        if name not in specs:
            raise InvalidRequest(f"no input {show(name)}; the model takes {_takes(signature)}")
        tensor, single = _tensor(specs[name], data)
        tensors.append(tensor)
        singles.append(single)
    return tensors, all(singles)


def _by_input(document: Any, signature: Signature) -> Mapping[str, Any]:
    names = [spec.name for spec in signature.inputs]
    if isinstance(document, dict) and document and not set(document) <= set(names):
        wrapper = next((key for key in WRAPPERS if key in document), None)
        if wrapper is not None:
            others = sorted(set(document) - {wrapper})
            if others:
                raise InvalidRequest(
                    f"beside {wrapper!r} the JSON has {show(others)}, which means nothing here; the model takes {_takes(signature)}"
                )
            document = document[wrapper]
    if isinstance(document, dict):
        if not document and any(not spec.optional for spec in signature.inputs):
            raise InvalidRequest(f"the JSON object is empty; the model takes {_takes(signature)}")
        return document
    needed = [spec.name for spec in signature.inputs if not spec.optional]
    if len(needed) != 1:
        raise InvalidRequest(
            f"the model has {len(needed)} inputs: name them, as in {{{', '.join(f'{name!r}: [...]' for name in needed[:4])}}}"
        )
    return {needed[0]: document}


def _tensor(spec: TensorSpec, data: Any) -> tuple[Tensor, bool]:
    shape = _shape(data, spec)
    rank = len(spec.shape)
    single = len(shape) == rank - 1 and spec.shape[0] in (-1, 1)
    if len(shape) != rank and not single:
        raise InvalidRequest(
            f"input {show(spec.name)}: data is nested {len(shape)} deep (shape {list(shape)}), but the model takes {list(spec.shape)} (-1: any size)"
            + (", with or without the first axis" if rank and spec.shape[0] in (-1, 1) else "")
        )
    full = (1, *shape) if single else shape
    flat = [data] if single else data
    count = math.prod(full)
    if spec.datatype not in _HALF:
        return Tensor(spec.name, spec.datatype, full, pack_json(spec.name, spec.datatype, full, count, flat)), single
    values = np.frombuffer(pack_json(spec.name, "FP32", full, count, flat), "<f4").reshape(full)
    too_large = np.flatnonzero(np.abs(values) > _HALF[spec.datatype])
    if too_large.size:
        element = f"element {too_large[0]} is {values.flat[too_large[0]]:.9g}"
        raise InvalidRequest(f"input {show(spec.name)}: {element}; {spec.datatype} takes numbers up to ±{_HALF[spec.datatype]:.6g}")
    return to_tensor(spec.name, spec.datatype, values), single


def _shape(data: Any, spec: TensorSpec) -> tuple[int, ...]:
    """Lengths along the first elements; whether the rest agrees is checked when elements are packed."""
    shape: list[int] = []
    while type(data) is list:
        shape.append(len(data))
        if len(shape) > MAX_DEPTH:
            raise InvalidRequest(f"input {show(spec.name)}: data is nested more than {MAX_DEPTH} deep")
        if not data:
            break
        data = data[0]
    if type(data) is dict:
        raise InvalidRequest(f"input {show(spec.name)}: {show(data)} is an object; send numbers in nested lists")
    return tuple(shape)


def _takes(signature: Signature) -> str:
    return ", ".join(f"{spec.name} ({spec.datatype} {list(spec.shape)})" for spec in signature.inputs) or "no input, as in {}"
