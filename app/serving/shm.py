"""Arenas: anonymous memory (memfd) through which tensors pass between the server and one instance of a runner.

A memfd has no name to leak and no 64 MB limit (memfd_create(2)). The server writes and reads with pwritev/pread: one system call for
all tensors of a batch, no mapping to keep in step, and the GIL is released while bytes move. The runner maps the file and computes on it.
It knows nothing of models or requests.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final

from app.domain import Buffer

ALIGNMENT: Final = 64
"""Every tensor starts at a multiple of this, so that vector kernels load aligned."""
KEPT_BYTES: Final = 1 << 20
"""An arena up to this size is never shrunk: giving pages back and taking them again costs more than it saves."""
_IOV_MAX: Final = 1024
_CHUNK: Final = 1 << 30
_PADDING: Final = bytes(ALIGNMENT)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return (size + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


def padding(size: int) -> bytes:
    """The zero bytes that follow a tensor of `size` bytes."""
    return _PADDING[: -size % ALIGNMENT]


def size_of(data: Buffer) -> int:
    """Bytes in a buffer, also where a memoryview has larger items."""
    return data.nbytes if isinstance(data, memoryview) else len(data)


def write_all(fd: int, buffers: Sequence[Buffer], offset: int = 0) -> int:
    """Write the buffers one after another at `offset`, extending the file; returns the bytes written."""
    if len(buffers) <= _IOV_MAX:
        total = sum(map(size_of, buffers))
        if os.pwritev(fd, buffers, offset) == total:
            return total
    position = offset
    for data in buffers:
        view = memoryview(data).cast("B") if size_of(data) else memoryview(b"")
        while view.nbytes:
            written = os.pwrite(fd, view[:_CHUNK], position)
            view, position = view[written:], position + written
    return position - offset


def read_all(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, copied out."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise EOFError(f"arena ends at {offset + len(data)}, {size} bytes at {offset} were promised")
        data += more
    return data


class Arena:
    """The server's end. Only its instance's batch in flight uses it, so it may be cut whenever that instance is free."""

    __slots__ = ("_needed", "_size", "fd")

    def __init__(self) -> None:
        self.fd = os.memfd_create("hone-arena", os.MFD_CLOEXEC)
        self._size = 0
        self._needed = 0.0

    def settle(self, used: int) -> None:
        """Note what a finished batch used; give pages back once batches have been much smaller than the arena for a while.

        The runner's mapping may then reach past the end of the file: harmless, for it touches only what the next batch has written.
        """
        self._size = max(self._size, used)
        if self._size <= KEPT_BYTES:
            return
        self._needed = max(used, self._needed * 0.9)
        if self._size > 2 * self._needed + KEPT_BYTES:
            self.trim(int(self._needed))

    def trim(self, keep: int = 0) -> None:
        """Cut the file to `keep` bytes (a free instance's contents are of no use to anyone)."""
        if self._size > keep:
            os.ftruncate(self.fd, keep)
            self._size = keep

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Mapping:
    """The runner's end: the arena as memory, mapped anew when a batch needs more than is mapped."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    def reach(self, size: int) -> tuple[memoryview, bool]:
        """Memory of at least `size` bytes, and whether it was mapped anew (older views then show nothing of use)."""
        if self._map is not None and len(self._map) >= size:
            return memoryview(self._map), False
        length = max(mmap.PAGESIZE, 1 << max(0, size - 1).bit_length())
        if os.fstat(self.fd).st_size < length:
            os.ftruncate(self.fd, length)
        self._map = mmap.mmap(self.fd, length)  # the old one goes when its last view goes
        return memoryview(self._map), True
