"""Canonical Huffman codes of bytes (Huffman 1952), decoded many lanes at a time so that numpy, not Python, walks the bits.

A stream says what its code is, but not how many symbols it holds: the reader must know, and must have bounded that number.
"""

from __future__ import annotations

import heapq
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
LONGEST: Final = 15
"""Bits of the longest code: a table of 2¹⁵ entries decodes one symbol a look, and a length fits half a byte."""
LANE: Final = 1024
"""Symbols that one lane decodes; its bits are counted in 16."""


def code_lengths(counts: NDArray[Any]) -> Bytes:
    """Bits of each symbol's code, 0 for one that does not occur. Counts are flattened until no code is longer than LONGEST."""
    lengths = _tree_depths(counts)
    while lengths.max(initial=0) > LONGEST:
        counts = np.where(counts > 0, counts // 2 + 1, 0)
        lengths = _tree_depths(counts)
    return lengths.astype(np.uint8)


def encode(symbols: Bytes) -> bytes:
    """Lengths of the codes, bits of each lane, the bits."""
    counts = np.bincount(symbols, minlength=1)
    lengths = code_lengths(counts)
    taken, code = lengths[symbols], _canonical(lengths).astype(np.uint16)[symbols]
    ends = np.cumsum(taken, dtype=np.int64)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(taken > place)
        bits[ends[longer] - taken[longer] + place] = code[longer] >> (taken[longer] - 1 - place) & 1
    lanes = np.diff(ends[[*range(LANE - 1, len(ends) - 1, LANE), len(ends) - 1]] if len(ends) else ends, prepend=0)
    halves = np.append(lengths, np.zeros(len(lengths) % 2, np.uint8))
    table = bytes([len(lengths) - 1]) + (halves[::2] << 4 | halves[1::2]).tobytes()
    return table + lanes.astype("<u2").tobytes() + np.packbits(bits).tobytes()


def decode(data: bytes, count: int) -> Bytes:
    """`count` symbols. Raises ValueError for a stream that is cut short, inconsistent or no such code."""
    size = data[0] + 1 if data else 0
    halves = np.frombuffer(data[1 : 1 + (size + 1) // 2], np.uint8)
    start = 1 + len(halves)
    lanes = -(-count // LANE)
    if not data or len(halves) * 2 < size or len(data) < start + 2 * lanes:
        raise ValueError("the stream is cut short")
    if count == 0:
        return np.zeros(0, np.uint8)
    lane_bits = np.frombuffer(data[start : start + 2 * lanes], "<u2").astype(np.int64)
    payload = np.frombuffer(data[start + 2 * lanes :], np.uint8)
    if lane_bits.sum() < count or len(payload) != -(-int(lane_bits.sum()) // 8):
        raise ValueError("the bits do not fit the number of symbols")
    lengths = np.stack([halves >> 4, halves & 15], axis=1).ravel()[:size]
    return _walk(payload, lane_bits, count, *_tables(lengths))


def _walk(payload: Bytes, lane_bits: NDArray[np.int64], count: int, symbol_of: Bytes, bits_of: Bytes) -> Bytes:
    """All lanes a symbol at a time; each must end where the next begins."""
    padded = np.concatenate([payload, np.zeros(2 * LANE + 8, np.uint8)]).astype(np.uint32)
    windows = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    ends = np.cumsum(lane_bits)
    at = ends - lane_bits
    out = np.zeros((len(lane_bits), LANE), np.uint8)
    last = count - (len(lane_bits) - 1) * LANE
    live = len(lane_bits)
    for step in range(min(LANE, count)):
        if step == last:
            live -= 1
        place = at[:live]
        seen = (windows[place >> 3] >> (24 - LONGEST - (place & 7)).astype(np.uint32)) & ((1 << LONGEST) - 1)
        out[:live, step] = symbol_of[seen]
        at[:live] += bits_of[seen]
    if not np.array_equal(at, ends):
        raise ValueError("a lane does not end where it should")
    return out.ravel()[:count]


def _tables(lengths: Bytes) -> tuple[Bytes, Bytes]:
    """Symbol and code length for every window of LONGEST bits; length 0 where no code begins so."""
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    spans = 1 << (LONGEST - lengths[order].astype(np.int64))
    if spans.sum() > 1 << LONGEST:
        raise ValueError("the lengths are those of no code")
    rest = np.zeros((1 << LONGEST) - int(spans.sum()), np.uint8)
    symbols = np.concatenate([np.repeat(order.astype(np.uint8), spans), rest])
    return symbols, np.concatenate([np.repeat(lengths[order], spans), rest])


def _canonical(lengths: Bytes) -> NDArray[np.int64]:
    """The code of each symbol: counted up in the order of (length, symbol)."""
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for length, symbol in sorted((int(length), s) for s, length in enumerate(lengths) if length):
        code <<= length - previous
        codes[symbol], previous = code, length
        code += 1
    return codes


def _tree_depths(counts: NDArray[Any]) -> NDArray[np.int64]:
    depths = np.zeros(len(counts), np.int64)
    heap: list[tuple[int, int, list[int]]] = [(int(count), s, [s]) for s, count in enumerate(counts) if count]
    if len(heap) == 1:
        depths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, first, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        depths[left + right] += 1
        heapq.heappush(heap, (a + b, first, left + right))
    return depths
