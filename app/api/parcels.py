"""Objects with large buffers in shared memory, as one process packs and another opens them without copying. Between Hone's own processes only."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from typing import Any, Final, cast

from app.api.memfd import Memfd
from app.api.wire import ParsedRequest, Reply, chosen
from app.domain import Buffer, InferenceRequest, InferenceResult, Tensor

_NUMBER: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 64


def pack_parcel(content: object) -> Memfd:
    """`content` in new shared memory: a table of sizes, its pickle, then its large buffers, aligned."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    memory = Memfd.new([b"".join(map(_NUMBER.pack, (len(parts), *map(len, parts))))])
    at = _NUMBER.size * (1 + len(parts))
    for part in parts:
        at = _aligned(at)
        memory.skip_to(at)
        memory.write(part)
        at += len(part)
    return memory


def open_parcel(memory: Memfd) -> Any:
    """The content of a parcel; its large buffers are slices of the mapped memory."""
    view = memory.map()
    (count,) = _NUMBER.unpack_from(view, 0)
    at = _NUMBER.size * (1 + count)
    parts = []
    for index in range(count):
        (size,) = _NUMBER.unpack_from(view, _NUMBER.size * (1 + index))
        at = _aligned(at)
        parts.append(view[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])


def encode_parcel(result: InferenceResult, parsed: ParsedRequest) -> Memfd:
    """For `HelperPool.encode`: the outputs that are wanted and the reply's form, without the inputs."""
    outputs = [out_of_band(tensor) for tensor, _ in chosen(result, parsed)]
    form = ParsedRequest(InferenceRequest([]), parsed.id, parsed.outputs, parsed.binary_default)
    return pack_parcel((replace(result, outputs=outputs), form))


def reply_parcel(reply: Reply) -> Memfd:
    """For `HelperPool.compress`."""
    return pack_parcel(replace(reply, parts=list(map(_aside, reply.parts))))


def out_of_band(tensor: Tensor) -> Tensor:
    return replace(tensor, data=_aside(tensor.data))


def _aside(data: Buffer) -> Buffer:
    """Marked for pickle to leave out of its stream."""
    return cast(Buffer, pickle.PickleBuffer(data))


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT
