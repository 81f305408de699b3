"""Whether a candidate may stand in for golden at all (same inputs, same outputs, no axis frozen), and whether it is anything new."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import onnx
import onnx.numpy_helper

from optimizers.arm import Opened
from optimizers.session import TensorInfo

_SIZE_MARGIN: Final = 0.1
"""Files whose sizes differ by more than this share are not the same model under other names."""


def interface_objections(golden: Opened, candidate: Opened) -> list[str]:
    """Why the candidate cannot stand in for golden, by names, types and shapes; empty where it can."""
    return [
        *_objections("input", golden.inputs, candidate.inputs),
        *_objections("output", golden.outputs, candidate.outputs),
    ]


def _objections(what: str, golden: Iterable[TensorInfo], candidate: Iterable[TensorInfo]) -> list[str]:
    was, now = {info.name: info for info in golden}, {info.name: info for info in candidate}
    found = [f"{what} {name!r} of golden is missing" for name in was if name not in now]
    found += [f"{what} {name!r} is new; golden has {', '.join(was) or 'none'}" for name in now if name not in was]
    for name in [name for name in was if name in now]:
        if was[name].type != now[name].type:
            found.append(f"{what} {name!r} is {now[name].type}, golden's is {was[name].type}")
        found += _shape_objections(what, was[name], now[name])
    return found


def _shape_objections(what: str, was: TensorInfo, now: TensorInfo) -> list[str]:
    if len(was.shape) != len(now.shape):
        return [f"{what} {was.name!r} has shape {list(now.shape)}, golden's is {list(was.shape)}"]
    found = []
    for axis, (old, new) in enumerate(zip(was.shape, now.shape, strict=True)):
        if isinstance(new, int) and not isinstance(old, int) and what == "input":
            frozen = "the batch is frozen" if axis == 0 else f"axis {axis} is frozen"
            found.append(
                f"{frozen}: {what} {was.name!r} takes only {new} on axis {axis}, golden takes any size; export it with dynamic shapes"
            )
        elif isinstance(new, int) and isinstance(old, int) and new != old:
            found.append(f"{what} {was.name!r} has size {new} on axis {axis}, golden's is {old}")
    return found


def same_model(one: Path, other: Path) -> bool:
    """True where two files hold the same graph with the same weights, whatever its nodes, tensors and producer are called."""
    sizes = sorted(path.stat().st_size for path in (one, other))
    if sizes[1] - sizes[0] > _SIZE_MARGIN * sizes[1] + 4096:
        return False
    return nameless(onnx.load(one).graph) == nameless(onnx.load(other).graph)


def nameless(graph: onnx.GraphProto) -> str:
    """A hash of the graph in which tensors are called by their order of appearance; only names of inputs and outputs count."""
    digest = hashlib.sha256()
    _add(digest, graph, {value.name: value.name for value in (*graph.input, *graph.output)})
    return digest.hexdigest()


def _add(digest: hashlib._Hash, graph: onnx.GraphProto, names: dict[str, str]) -> None:
    def plain(name: str) -> str:
        return names.setdefault(name, f"t{len(names)}") if name else ""

    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        digest.update(repr((plain(value.name), kind.elem_type, sizes)).encode())
    for node in graph.node:
        digest.update(repr((node.domain, node.op_type, list(map(plain, node.input)), list(map(plain, node.output)))).encode())
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            digest.update(attribute.name.encode())
            if attribute.HasField("g"):
                _add(digest, attribute.g, names)
            elif attribute.HasField("t"):
                _add_tensor(digest, attribute.t)
            else:
                digest.update(attribute.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda tensor: plain(tensor.name)):
        digest.update(plain(tensor.name).encode())
        _add_tensor(digest, tensor)


def _add_tensor(digest: hashlib._Hash, tensor: onnx.TensorProto) -> None:
    values = onnx.numpy_helper.to_array(tensor)
    digest.update(repr((tensor.data_type, values.shape)).encode())
    digest.update(repr(values.tolist()).encode() if values.dtype == object else values.tobytes())
