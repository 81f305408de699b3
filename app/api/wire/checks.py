"""Whether a well-formed request fits a model: names, datatypes, shapes, rows. Knows the Signature, nothing of bytes or HTTP."""

from __future__ import annotations

from app.api.wire.request import ParsedRequest
from app.api.wire.tensors import ONLY_BINARY, no_json_output, show
from app.domain import InferenceRequest, Signature, TensorSpec
from app.errors import InvalidRequest


def validate(request: InferenceRequest, signature: Signature) -> int:
    """Check `request` against what the version takes and gives; returns its rows (1 where rows may not share a call)."""
    specs = {spec.name: spec for spec in signature.inputs}
    rows = -1
    for tensor in request.inputs:
        spec = specs.pop(tensor.name, None)
        if spec is None:
            raise InvalidRequest(f"no input {show(tensor.name)}; the model takes {_names(signature.inputs)}")
        if tensor.datatype != spec.datatype:
            raise InvalidRequest(
                f"input {show(spec.name)}: datatype is {tensor.datatype}, but the model takes {spec.datatype}; convert it before sending"
            )
        shape = tensor.shape
        if shape != spec.shape:
            _check_shape(spec, shape)
        if signature.batchable and shape:
            if rows not in (-1, shape[0]):
                raise InvalidRequest(
                    f"input {show(spec.name)} has {shape[0]} rows, but {show(request.inputs[0].name)} has {rows}; all inputs have the same first dimension"
                )
            rows = shape[0]
    for spec in specs.values():
        if not spec.optional:
            raise InvalidRequest(f"input {show(spec.name)} is missing; the model takes {_names(signature.inputs)}")
    if request.outputs is not None:
        given = [spec.name for spec in signature.outputs]
        for name in request.outputs:
            if name not in given:
                raise InvalidRequest(f"no output {show(name)}; the model gives {_names(signature.outputs)}")
    return rows if rows >= 0 else 1


def check_reply_form(parsed: ParsedRequest, signature: Signature) -> None:
    """Refuse before computing what could not be answered: an FP16 or BF16 output that was not asked for as binary."""
    if parsed.outputs is None and parsed.binary_default:
        return
    binary = {choice.name: choice.binary for choice in parsed.outputs or ()}
    for spec in signature.outputs:
        if (
            spec.datatype in ONLY_BINARY
            and (parsed.outputs is None or spec.name in binary)
            and not binary.get(spec.name, parsed.binary_default)
        ):
            raise InvalidRequest(no_json_output(spec.name, spec.datatype))


def _check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    if len(shape) != len(spec.shape):
        raise InvalidRequest(
            f"input {show(spec.name)}: shape {show(list(shape))} has {len(shape)} dimensions, not {len(spec.shape)}; {_rule(spec)}"
        )
    for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if size != wanted != -1:
            raise InvalidRequest(
                f"input {show(spec.name)}: shape {show(list(shape))} has {size} on axis {axis}, not {wanted}; {_rule(spec)}"
            )


def _rule(spec: TensorSpec) -> str:
    return f"the model takes {list(spec.shape)}" + (" (-1: any size)" if -1 in spec.shape else "")


def _names(specs: tuple[TensorSpec, ...]) -> str:
    text = ", ".join(f"{show(spec.name)} ({spec.datatype} {list(spec.shape)}{', optional' if spec.optional else ''})" for spec in specs)
    return text if len(text) <= 500 else text[:497] + "..."
