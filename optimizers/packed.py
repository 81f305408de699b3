"""The packed form of an ONNX file: weights entropy-coded, the rest compressed, the very bytes back. Made for codebooks, right for any file.

`unpack` reads files that nobody has vouched for: every size is checked before memory is taken, and the result against its SHA-256.

    HONEPACK 1 | sha256 of the ONNX file | its size | number of tensors | compressed rest | per tensor: gap, coding, size, coded size | coded tensors
"""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from optimizers import huffman
from optimizers.base import Budget, Rejected
from optimizers.onnx_file import PROTOBUF_LIMIT, read, tensors

MAGIC: Final = b"HONEPACK\x01"
_HEAD: Final = struct.Struct("<32sQIQ")
_ENTRY: Final = struct.Struct("<QBQQ")
_SPARSE: Final = struct.Struct("<QQQ")
LEAST: Final = 64
"""Tensors below so many bytes stay with the rest."""
SLOW: Final = 1 << 16
"""Indices of so many bytes and more are not tried with LZMA, which takes long and gains nothing over a code of single indices."""
SPARSE_BELOW: Final = 0.6
"""Share of non-zeros from which on gaps between them cannot be worth their own code."""
ZEROS: Final = 255
"""In a sparse tensor's gaps: so many zeros and no value after them (Han et al. 2016, section 2)."""
_DECODER_BYTES: Final = 64 << 20
_NIBBLES: Final = frozenset({TensorProto.INT4, TensorProto.UINT4})
_OCTETS: Final = frozenset({TensorProto.INT8, TensorProto.UINT8})


class Coding(IntEnum):
    """How one tensor is coded."""

    STORED = 0
    LZMA = 1
    PLANES = 2
    HUFFMAN = 3
    HUFFMAN_NIBBLES = 4
    SPARSE = 5
    SPARSE_NIBBLES = 6


@dataclass(frozen=True)
class Packed:
    """What packing gave. `codings`: how often each coding was the smallest."""

    path: Path
    bytes: int
    bytes_before: int
    sha256: str
    codings: dict[str, int]


def pack(model: Path, out: Path) -> Packed:
    """Write the packed form of the ONNX file `model`. Raises Rejected for a file with external data, or that is no ONNX file."""
    file = read(model)
    if len(file.files) > 1:
        raise Rejected(f"{model.name} keeps weights in {file.files[1].name}; only a single file is packed: save it without external data")
    data = model.read_bytes()
    entries, coded, rest, at = [], [], [], 0
    for place, tensor in _placed(file.model, data):
        raw = tensor.raw_data
        coding, best = min(((coding, encode(raw)) for coding, encode in _candidates(tensor)), key=lambda found: len(found[1]))
        entries.append(_ENTRY.pack(place - at, coding, len(raw), len(best)))
        coded.append((coding, best))
        rest.append(data[at:place])
        at = place + len(raw)
    kept = _compress(b"".join([*rest, data[at:]]))
    digest = hashlib.sha256(data)
    head = MAGIC + _HEAD.pack(digest.digest(), len(data), len(entries), len(kept))
    _write(out, b"".join([head, kept, *entries, *(best for _, best in coded)]))
    names = [coding.name.lower() for coding, _ in coded]
    return Packed(out, out.stat().st_size, len(data), digest.hexdigest(), {name: names.count(name) for name in sorted(set(names))})


def unpack(packed: Path, out: Path, most_bytes: int = PROTOBUF_LIMIT) -> Path:
    """Write the ONNX file that was packed to `out`, byte for byte. Raises Rejected: no packed file, damaged, or beyond `most_bytes`."""
    size = packed.stat().st_size
    if size > most_bytes:
        raise Rejected(f"{packed.name} has {size} bytes; at most {most_bytes} are taken")
    try:
        data = _unpacked(packed.read_bytes(), most_bytes)
    except (ValueError, IndexError, struct.error, lzma.LZMAError, EOFError) as error:
        raise Rejected(f"{packed.name} is no packed model, or is damaged: {error}; copy it again") from None
    _write(out, data)
    return out


def run(request: dict[str, Any], budget: Budget) -> dict[str, str]:
    """The task `unpack`: {path, out} -> {path, sha256} of the ONNX file. Raises as `unpack` does."""
    out = unpack(Path(request["path"]), Path(request["out"]))
    return {"path": str(out), "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}


def _unpacked(data: bytes, most_bytes: int) -> bytes:
    if not data.startswith(MAGIC):
        raise ValueError("it does not begin with HONEPACK 1")
    at = len(MAGIC) + _HEAD.size
    digest, size, count, rest_size = _HEAD.unpack(data[len(MAGIC) : at])
    if size > most_bytes:
        raise ValueError(f"it claims to unpack to {size} bytes, and at most {most_bytes} are taken")
    table = at + rest_size
    if table + count * _ENTRY.size > len(data):
        raise ValueError("it is cut short")
    entries = [_ENTRY.unpack_from(data, table + i * _ENTRY.size) for i in range(count)]
    left = size - sum(raw for _, _, raw, _ in entries)
    coded_at = table + count * _ENTRY.size
    if left < 0 or coded_at + sum(coded for *_, coded in entries) != len(data) or sum(gap for gap, *_ in entries) > left:
        raise ValueError("its sizes do not add up")
    rest = _decompress(data[at:table], left)
    out, taken = bytearray(), 0
    for gap, coding, raw, coded in entries:
        out += rest[taken : taken + gap]
        taken += gap
        out += _DECODERS[Coding(coding)](data[coded_at : coded_at + coded], raw)
        coded_at += coded
    out += rest[taken:]
    if hashlib.sha256(out).digest() != digest:
        raise ValueError("its contents do not have the hash that it names")
    return bytes(out)


def _placed(model: ModelProto, data: bytes) -> Iterator[tuple[int, TensorProto]]:
    """Tensors with their bytes' places in the file, in order. A tensor whose bytes are not found after the last one's stays with the rest."""
    at = 0
    for tensor in tensors(model):
        if len(tensor.raw_data) < LEAST:
            continue
        place = data.find(tensor.raw_data, at)
        if place >= 0:
            yield place, tensor
            at = place + len(tensor.raw_data)


def _candidates(tensor: TensorProto) -> list[tuple[Coding, Callable[[bytes], bytes]]]:
    found: list[tuple[Coding, Callable[[bytes], bytes]]] = [(Coding.STORED, bytes)]
    if tensor.data_type not in _OCTETS | _NIBBLES or len(tensor.raw_data) < SLOW:
        found.append((Coding.LZMA, _compress))
    if tensor.data_type in _OCTETS | _NIBBLES:
        split, nibbles = (_nibbles, 1) if tensor.data_type in _NIBBLES else (_octets, 0)
        found.append((Coding(Coding.HUFFMAN + nibbles), lambda raw: huffman.encode(split(raw))))
        if np.count_nonzero(split(tensor.raw_data)) < SPARSE_BELOW * len(split(tensor.raw_data)):
            found.append((Coding(Coding.SPARSE + nibbles), lambda raw: _sparse(split(raw))))
    elif len(tensor.raw_data) % 4 == 0:
        found.append((Coding.PLANES, lambda raw: _compress(_octets(raw).reshape(-1, 4).T.tobytes())))
    return found


def _octets(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(raw, np.uint8)


def _nibbles(raw: bytes) -> NDArray[np.uint8]:
    """Both halves of each byte, the lower first, as ONNX packs 4-bit numbers."""
    octets = _octets(raw)
    return np.stack([octets & 15, octets >> 4], axis=1).ravel()


def _joined(nibbles: NDArray[np.uint8]) -> bytes:
    return (nibbles[::2] & 15 | nibbles[1::2] << 4).tobytes()


def _sparse(symbols: NDArray[np.uint8]) -> bytes:
    """The gaps between non-zeros and the non-zeros, each with a Huffman code of its own."""
    at = np.flatnonzero(symbols)
    gaps = np.diff(at, prepend=-1) - 1
    skips = gaps // ZEROS
    stream = np.full(len(gaps) + int(skips.sum()), ZEROS, np.uint8)
    stream[np.cumsum(skips + 1) - 1] = gaps % ZEROS
    first, second = huffman.encode(stream), huffman.encode(symbols[at])
    return _SPARSE.pack(len(stream), len(at), len(first)) + first + second


def _dense(data: bytes, count: int) -> NDArray[np.uint8]:
    steps, values, split = _SPARSE.unpack_from(data)
    if values > min(steps, count) or steps > 8 * len(data) or _SPARSE.size + split > len(data):
        raise ValueError("a sparse tensor is inconsistent")
    gaps = huffman.decode(data[_SPARSE.size : _SPARSE.size + split], steps).astype(np.int64)
    at = np.cumsum(np.where(gaps == ZEROS, ZEROS, gaps + 1))[gaps != ZEROS] - 1
    if len(at) != values or (values and at[-1] >= count):
        raise ValueError("a sparse tensor has values beyond its end")
    symbols = np.zeros(count, np.uint8)
    symbols[at] = huffman.decode(data[_SPARSE.size + split :], values)
    return symbols


def _compress(raw: bytes) -> bytes:
    return lzma.compress(raw, preset=6)


def _decompress(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, and never more held."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DECODER_BYTES)
    out = decoder.decompress(data, size + 1)
    if len(out) != size or not (decoder.eof or decoder.needs_input):
        raise ValueError("a compressed part has another size than it should")
    return out


def _stored(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError("a stored tensor has another size than it should")
    return data


def _planes(data: bytes, size: int) -> bytes:
    return _octets(_decompress(data, size)).reshape(4, -1).T.tobytes()


_DECODERS: Final[dict[Coding, Callable[[bytes, int], Any]]] = {
    Coding.STORED: _stored,
    Coding.LZMA: _decompress,
    Coding.PLANES: _planes,
    Coding.HUFFMAN: lambda data, size: huffman.decode(data, size).tobytes(),
    Coding.HUFFMAN_NIBBLES: lambda data, size: _joined(huffman.decode(data, 2 * size)),
    Coding.SPARSE: lambda data, size: _dense(data, size).tobytes(),
    Coding.SPARSE_NIBBLES: lambda data, size: _joined(_dense(data, 2 * size)),
}


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_bytes(data)
    os.replace(scratch, path)
