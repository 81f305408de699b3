"""Reading an ONNX file that nobody has vouched for: bounds, external data inside its own folder, what it is made of.

Parses and looks, never runs: what ONNX Runtime makes of the model is optimizers.inspect's to find out.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from optimizers.base import Rejected

PROTOBUF_LIMIT: Final = (1 << 31) - 1
STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx"})
RUNTIME_DOMAINS: Final = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "ai.onnx.preview.training"}
)
SERVE_AT: Final = "hone.graph_level"
"""Metadata of a file whose graph was optimized beforehand: the level to serve it at."""
BITS: Final[dict[int, int]] = {
    TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.BOOL: 8,
    TensorProto.INT8: 8, TensorProto.INT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64,
    TensorProto.UINT8: 8, TensorProto.UINT16: 16, TensorProto.UINT32: 32, TensorProto.UINT64: 64, TensorProto.INT4: 4, TensorProto.UINT4: 4,
    TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8, TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.FLOAT4E2M1: 4, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128,
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFile:
    """A parsed file: `model` without its external data, `files` all files that it is made of, itself first."""

    path: Path
    model: ModelProto
    files: tuple[Path, ...]
    opsets: dict[str, int] = field(default_factory=dict)
    op_types: dict[str, int] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return sum(self.op_types.values())

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def serve_at(self) -> str:
        """The graph level that the file asks to be served at, or ''."""
        return next((prop.value for prop in self.model.metadata_props if prop.key == SERVE_AT), "")

    @property
    def custom_domains(self) -> tuple[str, ...]:
        """Domains that neither ONNX Runtime nor the file itself defines."""
        own = {function.domain for function in self.model.functions}
        return tuple(sorted({domain for domain, _ in _operators(self.model)} - RUNTIME_DOMAINS - own))


def read(path: Path, link_roots: Sequence[Path] = ()) -> OnnxFile:
    """Parse `path` and check all that it refers to. Links are followed only where they end inside one of `link_roots`.

    Raises Rejected, whose text names file or tensor, rule and remedy.
    """
    _check_regular(path, link_roots, f"{path.name}")
    size = path.stat().st_size
    if size == 0:
        raise Rejected(f"{path.name} is empty (0 bytes): the copy or upload was cut short; send it again")
    if size > PROTOBUF_LIMIT:
        raise Rejected(
            f"{path.name} has {size} bytes; an ONNX file holds at most 2 GiB: save it with external data (onnx.save(..., save_as_external_data=True))"
        )
    model = _parse(path)
    files = (path, *_external_files(model, path, link_roots))
    opsets = {entry.domain: int(entry.version) for entry in model.opset_import}
    op_types = Counter(node.op_type if domain in STANDARD_DOMAINS else f"{domain}:{node.op_type}" for domain, node in _operators(model))
    return OnnxFile(path, model, files, opsets, dict(op_types.most_common()))


def _parse(path: Path) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise Rejected(f"{path.name} is not an ONNX file, or was cut short: {' '.join(str(error).split())}") from None
    if not model.HasField("graph") or not model.graph.output:
        raise Rejected(f"{path.name} is not an ONNX model: it has no graph with outputs")
    if not model.opset_import:
        raise Rejected(f"{path.name} states no operator set (opset_import); export it again with a current exporter")
    return model


def size_of(path: Path) -> int:
    """Bytes of a model with the data that lies beside it. Raises Rejected as `read` does."""
    return read(path).bytes


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and every graph inside it (bodies of If, Loop, Scan)."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += _subgraphs(current.node)


def in_order(graph: GraphProto) -> list[NodeProto]:
    """The nodes, producers before consumers and else as they stand. Nodes in a circle come last."""
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waits_for: list[set[int]] = [{made_by[name] for name in _reads(node) if name in made_by} - {i} for i, node in enumerate(graph.node)]
    needed_by: list[list[int]] = [[] for _ in graph.node]
    for index, others in enumerate(waits_for):
        for other in others:
            needed_by[other].append(index)
    ready = [index for index, others in enumerate(waits_for) if not others]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for other in needed_by[index]:
            waits_for[other].discard(index)
            if not waits_for[other]:
                heapq.heappush(ready, other)
    order += sorted(set(range(len(graph.node))) - set(order))
    return [graph.node[index] for index in order]


def _reads(node: NodeProto) -> set[str]:
    """All values that a node needs: its inputs, and what its bodies take from outside."""
    names = set(filter(None, node.input))
    for body in _subgraphs([node]):
        for graph in graphs(body):
            names |= {name for inner in graph.node for name in inner.input} | {value.name for value in graph.output}
    return names


def _subgraphs(nodes: Sequence[NodeProto]) -> list[GraphProto]:
    found: list[GraphProto] = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
                found.append(attribute.g)
            found.extend(attribute.graphs)
    return found


def _all_graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield from graphs(model.graph)
    for function in model.functions:
        for body in _subgraphs(function.node):
            yield from graphs(body)


def _operators(model: ModelProto) -> Iterator[tuple[str, NodeProto]]:
    own = {(function.domain, function.name) for function in model.functions}
    bodies = [graph.node for graph in _all_graphs(model)] + [function.node for function in model.functions]
    for nodes in bodies:
        for node in nodes:
            if (node.domain, node.op_type) not in own:
                yield node.domain, node


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant of the model: initializers and constant attributes, in subgraphs and functions too."""
    nodes: list[NodeProto] = [node for function in model.functions for node in function.node]
    for graph in _all_graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _external_files(model: ModelProto, path: Path, link_roots: Sequence[Path]) -> list[Path]:
    needed: dict[str, tuple[int, str]] = {}
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            location, end = _external_span(tensor, path.name)
            if end >= needed.get(location, (-1, ""))[0]:
                needed[location] = (end, tensor.name)
    return [_checked_data(path, location, end, tensor, link_roots) for location, (end, tensor) in sorted(needed.items())]


def _external_span(tensor: TensorProto, model_name: str) -> tuple[str, int]:
    """Where a tensor's data lies and where it ends: (file name, first byte after it)."""
    entry = {item.key: item.value for item in tensor.external_data}
    location = entry.get("location", "")
    what = f"{model_name}: tensor {tensor.name!r} names external data {location!r}"
    if not location or "\0" in location:
        raise Rejected(f"{what}, which is no file name")
    if os.path.isabs(location) or "\\" in location or ":" in location:
        raise Rejected(f"{what}; it must be a plain file name beside the model, not an absolute path")
    if ".." in Path(location).parts or len(Path(location).parts) != 1:
        raise Rejected(f"{what}; it must lie in the model's own folder: save the model again with a plain file name as location")
    wanted = -(-_elements(tensor) * BITS.get(tensor.data_type, 8) // 8)
    try:
        offset, length = int(entry.get("offset") or 0), int(entry.get("length") or wanted)
    except ValueError:
        raise Rejected(f"{what} with an offset or length that is no number ({entry.get('offset')!r}, {entry.get('length')!r})") from None
    if offset < 0 or length < 0 or (tensor.data_type in BITS and length != wanted):
        raise Rejected(f"{what} with {length} bytes from {offset}; its shape {list(tensor.dims)} needs {wanted}")
    return location, offset + length


def _elements(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        if size < 0:
            raise Rejected(f"tensor {tensor.name!r} has a negative size in its shape {list(tensor.dims)}")
        count *= size
    return count


def _checked_data(path: Path, location: str, end: int, tensor: str, link_roots: Sequence[Path]) -> Path:
    file = path.parent / location
    if not os.path.lexists(file):
        raise Rejected(
            f"{path.name} keeps its weights in {location!r}, which is missing: put both files into the same folder, or upload both together "
            f"(a second file part named {location!r}); or save the model as one file (torch.onnx.export(..., external_data=False))"
        )
    _check_regular(file, link_roots, f"{path.name}'s external data {location!r}")
    if not any(file.resolve().is_relative_to(folder.resolve()) for folder in (path.parent, path.resolve().parent)):
        raise Rejected(
            f"{path.name}'s external data {location!r} links out of the model's folder, which ONNX Runtime does not follow: "
            "copy the files themselves (hone deploy does)"
        )
    size = file.stat().st_size
    if size < end:
        raise Rejected(
            f"{location!r} has {size} bytes, but tensor {tensor!r} of {path.name} ends at byte {end}: the copy was cut short or belongs to another model; copy both again"
        )
    return file


def _check_regular(path: Path, link_roots: Sequence[Path], what: str) -> None:
    try:
        linked = path.is_symlink()
        mode = path.stat().st_mode
    except OSError as error:
        raise Rejected(f"{what} cannot be read: {error.strerror}") from None
    if linked and not any(path.resolve().is_relative_to(root.resolve()) for root in link_roots):
        raise Rejected(f"{what} is a link to {os.readlink(path)!r}, outside what may be read; copy the file itself")
    if not stat.S_ISREG(mode):
        raise Rejected(f"{what} is not a regular file")


def checker_complaint(path: Path) -> str:
    """What onnx.checker says against the file, or ''. It is stricter than ONNX Runtime, so alone it is a note, not a refusal."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())[:500]
    return ""
